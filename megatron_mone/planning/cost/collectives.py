"""Seconds of one collective by the alpha-beta model: messages times latency, bytes over bandwidth.

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
from dataclasses import dataclass

from megatron_mone.common.spelling import nearest_name
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.placement import Placement

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
            all_reduce or reduce_scatter; what goes to all peers, itself included, of an
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


def _all_gather(size: float, p: Placement, links: Links) -> dict[str, float]:
    """A reduce-scatter backwards: its input is n times as large."""
    return _reduce_scatter(p.size * size, p, links)


def _broadcast(size: float, p: Placement, links: Links) -> dict[str, float]:
    return {"ring": _flat(1, 1.0, size, p, links)}


def _send(size: float, p: Placement, links: Links) -> dict[str, float]:
    if p.size != 2:
        raise ValueError(f"a send is between 2 ranks, not {p.size}: give the group of the two")
    if p.domains == 1:
        return {"direct": links.inside_latency + size / links.pair}
    return {"direct": links.outside_latency + size / links.spread}


def _all_to_all(size: float, p: Placement, links: Links) -> dict[str, float]:
    return {"pairwise": max(_all_to_all_parts(size, p, links))}


def _all_to_all_parts(size: float, p: Placement, links: Links) -> tuple[float, float]:
    """(seconds inside the domain, seconds on the network) of pairwise messages.

    A message to another rail moves to that rail's device of its own domain first (NCCL's PXN).
    """
    n, m = p.size, p.per_domain
    away = (n - m) / n * size
    near = (m - 1) / n * size + away * (1 - 1 / links.rails)
    inside = math.ceil((m - 1) / PEERS_AT_ONCE) * links.inside_latency + near / links.inside
    outside = math.ceil((n - m) / PEERS_AT_ONCE) * links.outside_latency + away / links.spread
    return inside, outside


def serial_all_to_all_cost(size: float, placement: Placement, cluster: Cluster) -> CollectiveCost:
    """An all-to-all that uses NVLink and the network in turn; `collective_cost` uses both at once.

    Args:
        size, placement, cluster: as in `collective_cost`.
    """
    if placement.size == 1:
        return FREE
    parts = _all_to_all_parts(size, placement, Links.of(placement, cluster))
    return CollectiveCost(cluster.launch_latency + sum(parts), "pairwise in turn")


OPERATIONS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send": _send,
    "recv": _send,
}
