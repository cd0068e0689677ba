"""Seconds of one collective by the alpha-beta model: messages times latency, bytes over bandwidth.

It depends on where the ranks of its group sit: how many share an NVLink domain and a leaf, rank r
running on device r. Beside the plain collectives stand DeepEP's hierarchical dispatch and combine.

Symbols: n ranks, m of them in an NVLink domain, d domains; S bytes that one rank puts in; a and B
latency and bandwidth, of the domain or of the network. What is assumed, beside the figures of the
cluster:
- all groups of the job run the same collective at once, so a rank counts on its own network card
  only, and an oversubscribed leaf is shared by all its devices;
- a ring passes through a domain once for each of its m ranks, so that it leaves by m cards;
- phases of a hierarchical algorithm follow each other; of the algorithms that apply the fastest
  is taken, as NCCL's tuner does with its own model (src/graph/tuning.cc, whose counts of hops are
  used here).
Touches nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from megatron_mone.common.spelling import nearest_name
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


# Messages of one rank that are under way together in an all-to-all: an assumption.
PEERS_AT_ONCE = 8


@dataclass(frozen=True)
class CollectiveCost:
    """Of one collective.

    Attributes:
        seconds: from its call to its end, if all ranks call together.
        algorithm: the one taken, or "none" in a group of 1.
    """

    seconds: float
    algorithm: str


FREE = CollectiveCost(0.0, "none")


def collective_cost(
    operation: str, size: float, placement: Placement, cluster: Cluster
) -> CollectiveCost:
    """The fastest algorithm of a collective.

    Args:
        operation: of OPERATIONS, named as the profiler does.
        size: bytes this rank puts in: its part of an all_gather; all of what is reduced of an
            all_reduce, reduce_scatter or reduce; what goes to all peers, itself included, of an
            all_to_all.
        placement: of the group; send and recv are between the two ranks of a group of 2.
        cluster: gives latencies and bandwidths.

    Raises:
        ValueError: an unknown operation, a negative size, or a send in a group of more than 2.
    """
    if operation not in OPERATIONS:
        raise ValueError(
            f"collective {operation!r} is unknown{nearest_name(operation, list(OPERATIONS))}; "
            f"choose one of {', '.join(OPERATIONS)}"
        )
    if not 0 <= size < math.inf:
        raise ValueError(f"size = {size} of {operation} must be 0 or more finite bytes")
    if placement.size == 1:
        return FREE
    if placement.domains == 1:
        cluster = cluster.inside.get(operation, cluster)
    links = Links.of(placement, cluster)
    algorithms = OPERATIONS[operation](size, placement, links)
    name = min(algorithms, key=lambda one: algorithms[one])
    return CollectiveCost(cluster.launch_latency + algorithms[name], name)


@dataclass(frozen=True)
class Links:
    """What one group gets of the cluster's links.

    Attributes:
        inside_latency, inside: seconds a hop, and bytes a second one rank sends to the others of
            its domain; 0 hops and infinite where it is alone there.
        pair: bytes a second between two ranks of a domain.
        outside_latency, ring, spread: seconds a message, and bytes a second through one network
            card in a ring over the domains, and in an all-to-all.
        rails: how many switch planes the ranks of a domain are on.
    """

    inside_latency: float
    inside: float
    pair: float
    outside_latency: float
    ring: float
    spread: float
    rails: int

    @classmethod
    def of(cls, placement: Placement, cluster: Cluster) -> Links:
        """Shares of the peaks, with an oversubscribed leaf's part in the network's."""
        domain, network = cluster.domain, cluster.network
        m, n = placement.per_domain, placement.size
        pair = domain.pair_bandwidth * domain.efficiency
        reach = min(domain.bandwidth, max(m - 1, 1) * domain.pair_bandwidth) * domain.efficiency
        card = network.bandwidth * network.efficiency
        # Of the traffic that leaves a domain, the part that leaves its leaf: by one edge in
        # domains-per-leaf of a ring that visits leaf after leaf, by peer in an all-to-all.
        crossing = placement.leaves / placement.domains if placement.leaves > 1 else 0.0
        outside = (n - placement.per_leaf) / (n - m) if placement.domains > 1 else 0.0
        over = network.oversubscription
        return cls(
            domain.latency,
            reach if m > 1 else math.inf,
            pair,
            network.latency,
            card / max(1.0, over * crossing),
            card / max(1.0, over * outside),
            min(m, network.rails),
        )


def _flat(passes: float, share: float, size: float, p: Placement, links: Links) -> float:
    """A ring over all ranks, `passes` times around; `share` x size goes through every rank."""
    across = p.domains - 1
    alpha = (p.size - 1 - across) * links.inside_latency + across * links.outside_latency
    slowest = min(links.inside, p.per_domain * links.ring) if across else links.inside
    return passes * alpha + share * size / slowest


def _steps(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    """One ring pass among `ranks`, each of which sends `size` bytes in ranks - 1 messages."""
    return (ranks - 1) * latency + size / bandwidth if ranks > 1 else 0.0


def _all_reduce(size: float, p: Placement, links: Links) -> dict[str, float]:
    n, m, d = p.size, p.per_domain, p.domains
    slowest = min(links.inside, m * links.ring) if d > 1 else links.inside
    # A double binary tree over domains, a chain inside; each byte goes up and down once.
    depth = math.ceil(math.log2(d))
    tree = 2 * ((m - 1) * links.inside_latency + depth * links.outside_latency)
    algorithms = {
        "ring": _flat(2, 2 * (n - 1) / n, size, p, links),
        "tree": tree + 2 * size / slowest,
    }
    if 1 < m < n and p.even:
        part = size / m
        passes = 2 * _steps(m, (m - 1) * part, links.inside_latency, links.inside)
        rings = 2 * _steps(d, (d - 1) / d * part, links.outside_latency, links.ring)
        trees = 2 * (depth * links.outside_latency + part / links.ring)
        algorithms["hierarchical"] = passes + min(rings, trees)
    return algorithms


def _reduce_scatter(size: float, p: Placement, links: Links) -> dict[str, float]:
    n, m, d = p.size, p.per_domain, p.domains
    algorithms = {"ring": _flat(1, (n - 1) / n, size, p, links)}
    if 1 < m < n and p.even:
        inside = _steps(m, (m - 1) / m * size, links.inside_latency, links.inside)
        across = _steps(d, (d - 1) / d * size / m, links.outside_latency, links.ring)
        algorithms["hierarchical"] = inside + across
    return algorithms


def _send(size: float, p: Placement, links: Links) -> dict[str, float]:
    if p.size != 2:
        raise ValueError(f"a send is between 2 ranks, not {p.size}: give the group of the two")
    if p.domains == 1:
        return {"direct": links.inside_latency + size / links.pair}
    return {"direct": links.outside_latency + size / links.spread}


def pairwise_parts(size: float, p: Placement, links: Links) -> tuple[float, float]:
    """(seconds inside the domain, seconds on the network) of pairwise messages.

    A message to another rail moves to that rail's device of its own domain first (NCCL's PXN).
    """
    n, m = p.size, p.per_domain
    away = (n - m) / n * size
    near = (m - 1) / n * size + away * (1 - 1 / links.rails)
    inside = math.ceil((m - 1) / PEERS_AT_ONCE) * links.inside_latency + near / links.inside
    outside = math.ceil((n - m) / PEERS_AT_ONCE) * links.outside_latency + away / links.spread
    return inside, outside


OPERATIONS: dict[str, Callable[[float, Placement, Links], dict[str, float]]] = {
    "all_reduce": _all_reduce,
    # A reduce-scatter backwards: its input is n times as large.
    "all_gather": lambda size, p, links: _reduce_scatter(p.size * size, p, links),
    "reduce_scatter": _reduce_scatter,
    "all_to_all": lambda size, p, links: {"pairwise": max(pairwise_parts(size, p, links))},
    "reduce": lambda size, p, links: {"ring": _flat(1, 1.0, size, p, links)},
    "broadcast": lambda size, p, links: {"ring": _flat(1, 1.0, size, p, links)},
    "send": _send,
    "recv": _send,
}


def expected_parts(chosen: int, experts: int, parts: int) -> float:
    """Parts of the experts that hold at least one of a token's, if all choices are alike.

    Args:
        chosen: experts of a token, different ones.
        experts: in all; `parts` divides them.
        parts: equal parts, such as ranks or domains.

    Raises:
        ValueError: parts that do not divide the experts, or more chosen than there are.
    """
    if parts < 1 or experts % parts or not 0 <= chosen <= experts:
        raise ValueError(
            f"chosen = {chosen}, experts = {experts}, parts = {parts}: parts must divide the "
            f"experts, and chosen be at most all of them"
        )
    missed = math.comb(experts - experts // parts, chosen) / math.comb(experts, chosen)
    return parts * (1.0 - missed)


def hierarchical_dispatch_cost(
    tokens: float,
    token_bytes: float,
    domains_per_token: float,
    ranks_per_token: float,
    placement: Placement,
    cluster: Cluster,
) -> CollectiveCost:
    """DeepEP's dispatch: a token crosses the network once for each domain, then takes NVLink.

    Both go on at once, chunk by chunk, so the slower one counts. The combine is the same way back.

    Args:
        tokens: of this rank.
        token_bytes: of one token as it travels.
        domains_per_token: that hold one of its experts, its own domain counted; see
            `expected_parts`, or less under node-limited routing.
        ranks_per_token: likewise of ranks.
        placement: of the expert-parallel group, equally many ranks in each domain.
        cluster: gives latencies and bandwidths.

    Raises:
        ValueError: a group that is uneven over domains, or more destinations than there are.
    """
    if not placement.even:
        raise ValueError(
            f"an expert-parallel group of {placement.size} ranks is uneven over "
            f"{placement.domains} domains: hierarchical dispatch needs equal parts"
        )
    if domains_per_token > placement.domains or ranks_per_token > placement.size:
        raise ValueError(
            f"domains_per_token = {domains_per_token}, ranks_per_token = {ranks_per_token} are "
            f"more than the {placement.domains} domains or {placement.size} ranks of the group"
        )
    if placement.size == 1:
        return FREE
    links = Links.of(placement, cluster)
    m, d = placement.per_domain, placement.domains
    # By symmetry a token's own domain holds 1 in d of its destinations, and the rank on which it
    # arrives in a domain (of the sender's own rail) 1 in m.
    away = tokens * token_bytes * domains_per_token * (d - 1) / d
    near = tokens * token_bytes * ranks_per_token * (m - 1) / m
    inside = near / links.inside
    outside = away / links.spread
    alpha = (links.inside_latency if m > 1 else 0.0) + (links.outside_latency if d > 1 else 0.0)
    return CollectiveCost(
        cluster.launch_latency + alpha + max(inside, outside), "hierarchical dispatch"
    )
