"""Which nodes are measured with which, and which node a failed pair is the fault of. Pure.

Nodes are numbers of the host list. Each meets its neighbours at distance one and two: with
neighbours alone a bad node every other place would spoil all pairs, and nobody could be named.
"""

from collections.abc import Collection

Pair = tuple[int, int]
DISTANCES = (1, 2)


def pair_rounds(nodes: int) -> tuple[tuple[Pair, ...], ...]:
    """The pairs of each round, lower node first; a node is in one pair of a round at most."""
    rounds = (
        tuple(
            (lower, lower + distance)
            for lower in range(nodes - distance)
            if lower // distance % 2 == parity
        )
        for distance in DISTANCES
        for parity in (0, 1)
    )
    return tuple(pairs for pairs in rounds if pairs)


def guilty_nodes(good: Collection[Pair], failed: Collection[Pair]) -> set[int]:
    """Nodes of which all pairs failed while one of their partners did well elsewhere.

    Of four or more nodes with no two bad ones side by side it names exactly the bad ones.
    """
    well = {node for pair in good for node in pair}
    return {
        node
        for pair in failed
        for node, partner in (pair, pair[::-1])
        if node not in well and partner in well
    }
