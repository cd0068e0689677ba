"""The steps of a run, read from its last rank's log, where Megatron prints them; a bar of them.

May touch: the log, read-only; the terminal. Where stderr is none there is no bar.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mone.common.progress import NOTE, WHAT, progress_bar
from megatron_mone.common.step_line import step_of

_SECONDS = 0.5
OnStep = Callable[[int, int, float], None]
"""Told (step, of how many, loss) of each line that has them."""


class StepReader:
    """What of a growing log was not read yet.

    Args:
        log: may not be there yet.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = 0
        self._rest = b""

    def new(self) -> list[tuple[int, int, float]]:
        """(step, of how many, loss) of each new whole line that has them."""
        if not self._log.exists():
            return []
        with self._log.open("rb") as stream:
            stream.seek(self._read)
            new = stream.read()
        self._read += len(new)
        lines = (self._rest + new).split(b"\n")
        self._rest = lines.pop()
        steps = (step_of(line.decode(errors="replace")) for line in lines)
        return [step for step in steps if step]


@contextmanager
def following(log: Path, on_step: OnStep) -> Iterator[None]:
    """Tell of the steps while the ranks run, and of the last ones when they have ended."""
    over, reader = threading.Event(), StepReader(log)

    def follow() -> None:
        ended = False
        while not ended:
            ended = over.wait(_SECONDS)
            for step in reader.new():
                on_step(*step)

    watcher = threading.Thread(target=follow, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@contextmanager
def step_bar(log: Path) -> Iterator[None]:
    """Draw the bar while the ranks run."""
    with progress_bar(WHAT, "bar", "count", NOTE, "left", first=None, transient=True) as bar:
        if not bar.drawn:
            yield
            return
        bar(0, None, "steps", note="starting")
        with following(
            log, lambda step, total, loss: bar(step, total, "steps", note=f"loss {loss:.4f}")
        ):
            yield
