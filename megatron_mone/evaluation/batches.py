"""Requests as rows of tokens: sorted, cut into passes, dealt to ranks. Touches nothing."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Tokens to score: those of `tokens` after the first, of which the last `scored` count."""

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from greedily, at most `most` more, until one of the texts `until`."""

    tokens: tuple[int, ...]
    most: int
    until: tuple[str, ...]


@dataclass(frozen=True)
class Pass:
    """One forward pass over all ranks.

    Attributes:
        dealt: the requests (indices) of each data-parallel rank.
        rows: a rank has, padding included: whole micro-batches, the same on every rank.
    """

    dealt: tuple[tuple[int, ...], ...]
    rows: int


def passes(lengths: Sequence[int], replicas: int, micro: int, batch: int) -> list[Pass]:
    """All requests in passes of similar length, the longest first.

    The longest come first, so that what does not fit into memory fails at once. All ranks have the
    same number of rows in a pass, since experts are reached by collectives that all take part in.

    Args:
        lengths: of the requests.
        replicas: data-parallel ranks.
        micro: micro-batches a pass is made of (pipeline stages).
        batch: most rows of a micro-batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    size = replicas * micro * batch
    found = []
    for start in range(0, len(order), size):
        part = order[start : start + size]
        dealt = tuple(tuple(part[replica::replicas]) for replica in range(replicas))
        found.append(Pass(dealt, micro * -(-len(dealt[0]) // micro)))
    return found


def width_of(length: int, multiple: int) -> int:
    """The columns of a pass: its longest row's, a multiple of what sequence parallelism splits."""
    return -(-length // multiple) * multiple
