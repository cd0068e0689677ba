"""A bar of the steps of a run, read from its last rank's log, where Megatron prints them.

May touch: the log, read-only; the terminal. Where stderr is none there is no bar.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_mone.common.step_line import step_of

_SECONDS = 0.5


class StepReader:
    """What of a growing log was not read yet.

    Args:
        log: may not be there yet.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = 0
        self._rest = b""

    def latest(self) -> tuple[int, int, float] | None:
        """(step, of how many, loss) of the last whole line that has them; None: no new one."""
        if not self._log.exists():
            return None
        with self._log.open("rb") as stream:
            stream.seek(self._read)
            new = stream.read()
        self._read += len(new)
        lines = (self._rest + new).split(b"\n")
        self._rest = lines.pop()
        steps = (step_of(line.decode(errors="replace")) for line in reversed(lines))
        return next((step for step in steps if step), None)


@contextmanager
def step_bar(log: Path) -> Iterator[None]:
    """Draw the bar while the ranks run."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    done = threading.Event()
    columns = (
        TextColumn("steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        watcher = threading.Thread(target=_follow, args=(StepReader(log), bar, done), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _follow(reader: StepReader, bar: Progress, done: threading.Event) -> None:
    task = bar.add_task("steps", total=None, loss="starting")
    while not done.wait(_SECONDS):
        latest = reader.latest()
        if latest is not None:
            step, total, loss = latest
            bar.update(task, completed=step, total=total, loss=f"loss {loss:.4f}")
