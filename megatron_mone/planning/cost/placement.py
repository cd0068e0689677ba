"""Where the ranks of a group sit: how many share an NVLink domain, and how many share a leaf.

Rank r runs on device r. A group's cost depends on these counts alone, since ranks of a domain are
alike. Touches nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_mone.planning.cost.hardware import Cluster


@dataclass(frozen=True)
class Placement:
    """A group over the devices of a cluster.

    Attributes:
        size: ranks of the group.
        per_domain: ranks in the NVLink domain that holds most of them.
        domains: NVLink domains with a rank.
        per_leaf: ranks under the leaf switch that holds most of them.
        leaves: leaf switches with a rank.
    """

    size: int
    per_domain: int
    domains: int
    per_leaf: int
    leaves: int

    @property
    def even(self) -> bool:
        """Whether every domain holds equally many ranks."""
        return self.per_domain * self.domains == self.size


def place_ranks(ranks: Sequence[int], cluster: Cluster) -> Placement:
    """The placement of a group that is given rank by rank.

    Raises:
        ValueError: no rank, a rank twice, or a negative one.
    """
    if not ranks or len(set(ranks)) != len(ranks) or min(ranks) < 0:
        raise ValueError(
            f"ranks = {str(list(ranks))[:60]} is no group: give distinct ranks from 0, at least one"
        )
    domains = Counter(rank // cluster.domain.devices for rank in ranks)
    leaves = Counter(rank // cluster.leaf_devices for rank in ranks)
    return Placement(
        len(ranks), max(domains.values()), len(domains), max(leaves.values()), len(leaves)
    )


def place_stride(size: int, stride: int, cluster: Cluster) -> Placement:
    """The placement of ranks 0, stride, 2 stride, ...: `size` of them.

    Raises:
        ValueError: a size or stride below 1.
    """
    for name, value in (("size", size), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} = {value} of a group must be 1 or more")
    domain = _spread(size, stride, cluster.domain.devices)
    return Placement(size, *domain, *_spread(size, stride, cluster.leaf_devices))


@lru_cache(maxsize=1024)  # a step asks for the same few groups thousands of times
def _spread(size: int, stride: int, devices: int) -> tuple[int, int]:
    """(ranks in the unit that holds most, units with a rank) of ranks 0, stride, ...."""
    units = Counter(rank // devices for rank in range(0, size * stride, stride))
    return max(units.values()), len(units)
