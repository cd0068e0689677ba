"""Signs of life for whoever watches a run from outside: a file touched each step, and stacks.

A job script names the file in MEGATRON_MONE_PROGRESS and sends SIGUSR2 to the ranks of a run that
touches it no more; each prints the stacks of all its threads to stderr and goes on. May touch: this
process's handler of SIGUSR2, Megatron's fault-tolerance hooks, the file.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRESS_VARIABLE = "MEGATRON_MONE_PROGRESS"
TOUCH_SECONDS = 1.0
_STDERR = 2
_HOOKS = ("on_training_step_end", "on_eval_step_end")


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
    from megatron.training import ft_integration

    originals = {hook: getattr(ft_integration, hook) for hook in _HOOKS}
    progress = Progress(Path(name))
    for hook, original in originals.items():
        setattr(ft_integration, hook, _then(original, progress))

    def end() -> None:
        for hook, original in originals.items():
            setattr(ft_integration, hook, original)

    return end


def _then(function: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        after()
        return result

    return both
