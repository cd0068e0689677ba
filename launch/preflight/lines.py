"""The lines of all tasks, read as what they are: text that anything may have written. Pure.

A line that is broken, too long or of an unknown host does not exist; its node is then silent. What
is kept has bounded sizes and no control characters.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_BYTES = 256 << 20
LONGEST_LINE = 64 << 10
_MOST_RANKS = 4096
_MOST_ITEMS = 32
_LONGEST_TEXT = 200


@dataclass(frozen=True)
class TaskLine:
    """What one task said. `node` and `partner` are numbers of the host list."""

    node: int
    local_rank: int
    ranks_per_node: int
    time: float
    """Seconds since the epoch by the node's clock."""
    faults: tuple[str, ...]
    versions: Mapping[str, str]
    node_gb_per_s: float | None
    pairs: Mapping[int, float | str]
    """partner -> GB/s, or why there is none."""


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without line feeds; longer ones in parts, which are no JSON.

    Raises:
        OSError: it cannot be read.
    """
    left = MOST_BYTES
    with path.open("rb") as file:
        while left > 0 and (line := file.readline(min(LONGEST_LINE, left))):
            left -= len(line)
            yield line.rstrip(b"\n")


def task_lines(lines: Iterator[bytes], hosts: Sequence[str]) -> list[TaskLine]:
    """What the tasks of the listed hosts said; of two lines of one task the first."""
    numbers = {host: number for number, host in enumerate(hosts)}
    found: dict[tuple[int, int], TaskLine] = {}
    for line in lines:
        task = _task(line, numbers)
        if task is not None:
            found.setdefault((task.node, task.local_rank), task)
    return list(found.values())


def printable(text: str) -> str:
    """Text for a terminal: one line, no control characters, not too long."""
    clean = "".join(c if c.isprintable() else " " for c in text[:_LONGEST_TEXT])
    return " ".join(clean.split())


def _task(line: bytes, numbers: Mapping[str, int]) -> TaskLine | None:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    node = _host(said.get("host"), numbers)
    local_rank = _count(said.get("local_rank"))
    ranks = _count(said.get("ranks_per_node"))
    clock = _number(said.get("time"))
    if node is None or local_rank is None or not ranks or local_rank >= ranks or clock is None:
        return None
    return TaskLine(
        node,
        local_rank,
        ranks,
        clock,
        tuple(printable(text) for text in _items(said.get("faults")) if isinstance(text, str)),
        {
            printable(name): printable(text)
            for name, text in _pairs_of(said.get("versions"))
            if isinstance(text, str)
        },
        _number(said.get("node_gb_per_s")),
        dict(_results(said.get("pairs"), len(numbers))),
    )


def _results(value: Any, nodes: int) -> Iterator[tuple[int, float | str]]:
    for name, result in _pairs_of(value):
        if not (name.isascii() and name.isdigit() and len(name) < 7 and int(name) < nodes):
            continue
        number = _number(result)
        if number is not None:
            yield int(name), number
        elif isinstance(result, str):
            yield int(name), printable(result)


def _host(name: Any, numbers: Mapping[str, int]) -> int | None:
    if not isinstance(name, str):
        return None
    # A node may say its full name where the list has the short one.
    return numbers.get(name, numbers.get(name.partition(".")[0]))


def _items(value: Any) -> list[Any]:
    return value[:_MOST_ITEMS] if isinstance(value, list) else []


def _pairs_of(value: Any) -> list[tuple[str, Any]]:
    return list(value.items())[:_MOST_ITEMS] if isinstance(value, dict) else []


def _count(value: Any) -> int | None:
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_RANKS
    return value if known else None


def _number(value: Any) -> float | None:
    """A number of 0 or more; None for infinities, NaN and integers too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not 0 <= value < 1e15 or math.isnan(value):
        return None
    return float(value)
