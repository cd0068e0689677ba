"""Seconds of DeepEP's hierarchical dispatch and combine, and how far a token's experts spread.

The model and its assumptions are those of collectives.py. Touches nothing.
"""

from __future__ import annotations

import math

from megatron_mone.planning.cost.collectives import FREE, CollectiveCost, Links
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.placement import Placement


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
