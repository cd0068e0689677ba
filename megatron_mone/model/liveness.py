"""Signs of life for whoever watches a run from outside: a file touched each step, and stacks.

A job script names the file in MEGATRON_MONE_PROGRESS and sends SIGUSR2 to the ranks of a run that
touches it no more; each prints the stacks of all its threads to stderr and goes on. May touch: this
process's handler of SIGUSR2, the file.
"""

import faulthandler
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_mone.common.patch import in_source, wrapping

PROGRESS_VARIABLE = "MEGATRON_MONE_PROGRESS"
TOUCH_SECONDS = 1.0
_STDERR = 2
_listeners: list[Callable[[], None]] = []
"""Of the end of a step."""


def dump_stacks_on_signal() -> None:
    """SIGUSR2 prints all threads' stacks, from C, so also while the interpreter hangs."""
    faulthandler.register(signal.SIGUSR2, file=_STDERR, all_threads=True, chain=False)


class Progress:
    """Touches a file when it is called, at most once in TOUCH_SECONDS.

    A file that cannot be written is said once: whoever watches it would take the run for hung.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0.0
        self._told = False

    def __call__(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + TOUCH_SECONDS
        try:
            self._path.touch()
        except OSError as error:
            if not self._told:
                print(f"megatron-mone: {self._path}: {error.strerror}", file=sys.stderr, flush=True)
            self._told = True


def report_progress() -> Callable[[], None]:
    """Touch the file after each step of training and evaluation, on rank 0, where one is named.

    Returns:
        What ends it.
    """
    name = os.environ.get(PROGRESS_VARIABLE)
    if not name or os.environ.get("RANK", "0") != "0":
        return lambda: None
    return on_step_end(Progress(Path(name)))


def on_step_end(listener: Callable[[], None]) -> Callable[[], None]:
    """Call `listener` after each step of training and evaluation; returns what ends it."""
    _listeners.append(listener)
    return functools.partial(_listeners.remove, listener)


def _telling(hook: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(hook)
    def telling() -> None:
        hook()
        for listener in _listeners:
            listener()

    return telling


PATCHES = (
    wrapping(
        "step-ends",
        "megatron.training.ft_integration: on_training_step_end, on_eval_step_end",
        _telling,
        why="nothing else of Megatron's loop says that a step has ended",
        needed_while=in_source("training/training.py", "ft_integration.on_training_step_end()"),
    ),
)
