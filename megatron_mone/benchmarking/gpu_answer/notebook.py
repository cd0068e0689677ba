"""A section's file: written beside and renamed after every row, so that a cut leaves the rows.

May touch: the file it is given.
"""

import time
from pathlib import Path
from typing import Any

from megatron_mone.common.documents import Part
from megatron_mone.kernels.gpu_answer_results import (
    AGAIN,
    Agreement,
    Check,
    Gaps,
    KernelTime,
    LayerTime,
    Section,
)

_LISTS: dict[type[Part], str] = {
    Agreement: "agreements", KernelTime: "kernels", LayerTime: "layers", Check: "checks",
    Gaps: "gaps",
}  # fmt: skip


class Notebook:
    """Takes down what a section finds.

    Args:
        path: of its file.
        name: of the section.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self._start = path, time.monotonic()
        self._found = blank(name).plain()
        self.close("running")

    def add(self, row: Part) -> None:
        """A row, by its class."""
        self._found[_LISTS[type(row)]].append(row.plain())
        self.close("running")

    def note(self, words: str) -> None:
        """What did not run, and why."""
        self._found["notes"].append(words)
        self.close("running")

    def fact(self, **facts: str) -> None:
        """Of the machine."""
        self._found["facts"] |= facts

    def peak(self, name: str, rate: float) -> None:
        """Bytes or operations a second."""
        self._found["peaks"][name] = rate
        self.close("running")

    def close(self, state: str, error: str | None = None) -> None:
        """Write the file."""
        seconds = time.monotonic() - self._start
        self._found |= {"state": state, "error": error, "seconds": seconds}
        Section.of(self._found, self.path).write(self.path)


def blank(name: str, state: str = "not started", error: str | None = None) -> Section:
    """A section without a row."""
    lists: dict[str, Any] = {kind: [] for kind in ("notes", *_LISTS.values())}
    return Section(
        name=name, state=state, seconds=0.0, error=error, facts={}, peaks={}, **lists
    )  # fmt: skip


def read(path: Path, name: str) -> Section:
    """The section in a file; a blank one where there is none."""
    return Section.read(path, AGAIN) if path.exists() else blank(name)
