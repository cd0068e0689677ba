"""Bars of work under way: drawn on a terminal, nothing elsewhere. May touch: the stream."""

import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Say = Callable[[int, int, str], None]
"""Told (done, of how many, of what)."""

WHAT, NOTE = "{task.description}", "{task.fields[note]}"
"""Columns; others are a format of the same kind, or one of these words."""
_COLUMNS: dict[str, type[ProgressColumn]] = {
    "bar": BarColumn,
    "count": MofNCompleteColumn,
    "percent": TaskProgressColumn,
    "elapsed": TimeElapsedColumn,
    "left": TimeRemainingColumn,
}


class Bars:
    """What `progress_bar` yields: call it to move a bar. `drawn` says whether anybody sees it."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tasks = progress, dict[Hashable, TaskID]()
        self.drawn = not progress.disable

    def __call__(
        self, done: int | None, total: int | None, what: str, *, bar: Hashable = None,
        note: str = "",
    ) -> None:  # fmt: skip
        """Move a bar, which is there from its first call on.

        Args:
            done: None leaves its clock standing.
            total: None where it is not known yet.
            what: its description.
            bar: which one, where there are several.
            note: for the column NOTE.
        """
        if bar not in self._tasks:
            self._tasks[bar] = self._progress.add_task(what, start=False, total=total, note=note)
        task = self._tasks[bar]
        if done is not None:
            self._progress.start_task(task)
        self._progress.update(task, completed=done, total=total, description=what, note=note)


@contextmanager
def progress_bar(
    *columns: str, first: str | None = "starting", stream: TextIO | None = None,
    transient: bool = False,
) -> Iterator[Bars]:  # fmt: skip
    """A bar on a terminal; more of them for who names them.

    Args:
        columns: words of the bar, as above (WHAT, "bar", "count", "elapsed").
        first: what the bar says before its first call; None: there is none before.
        stream: where it is drawn (stderr).
        transient: leave nothing of it at the end.
    """
    console = Console(file=stream or sys.stderr)
    drawn = [
        _COLUMNS[column]() if column in _COLUMNS else column
        for column in columns or (WHAT, "bar", "count", "elapsed")
    ]
    with Progress(
        *drawn, console=console, transient=transient, disable=not console.is_terminal
    ) as progress:
        bars = Bars(progress)
        if first is not None:
            bars(0, None, first)
        yield bars
