"""SIGTERM and SIGUSR1 to any one rank: all ranks save after the step under way and exit 75.

Megatron's `--exit-signal-handler` gathers a flag over the ranks once a step, saves, and exits with
status 0, which a scheduler cannot tell from a finished run; and it knows one signal. Here it gets
two signals and a status, and a signal during start-up is kept until the first step. The same flag
tells all ranks that rank 0 lost the checkpoint folder (ownership.py): they stop there, with no
save. May touch: this process's signal handlers, Megatron's global handler.
"""

from __future__ import annotations

import functools
import os
import signal
from argparse import Namespace
from collections.abc import Callable
from multiprocessing import managers, resource_tracker
from typing import Any

from megatron.training import global_vars
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_mone.checkpoint import ownership
from megatron_mone.checkpoint.lease.lease import LeaseLostError
from megatron_mone.common.child_processes import end_with

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOST = 2
"""What a rank's flag says in place of 0 or 1 when the checkpoint folder is lost."""


class StopHandler(DistributedSignalHandler):
    """Megatron's handler, listening to several signals and remembering that one stopped the run."""

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        super().__init__(signals[0])
        self.released = False
        self.stopped = False
        self._signal_received: int = False  # type: ignore[assignment]
        self._originals = {number: signal.getsignal(number) for number in signals}
        for number in signals:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._signal_received = True

    def signals_received(self) -> list[int]:
        """One flag a rank; collective over all ranks, called by Megatron at a step's end.

        Raises:
            LeaseLostError: on every rank: the checkpoint folder is another run's.
        """
        lost = ownership.lost()
        if lost is not None:
            self._signal_received = _LOST
        received = super().signals_received()
        if _LOST in received:
            raise LeaseLostError(lost or "rank 0 lost the checkpoint folder")
        self.stopped = self.stopped or any(received)
        return received

    def release(self) -> bool:
        """Give the signals back to whoever had them."""
        for number, original in self._originals.items():
            signal.signal(number, original)
        self._originals = {}
        return True


def arm(args: Namespace) -> StopHandler:
    """Listen from now on, and let Megatron ask this handler.

    Call it from the main thread, when Megatron's arguments are validated: by then its global state
    exists, without a handler unless --exit-signal-handler was given.
    """
    handler = StopHandler(tuple(dict.fromkeys((*SIGNALS, args.exit_signal))))
    if getattr(global_vars, "_GLOBAL_SIGNAL_HANDLER", None) is not None:
        global_vars.get_signal_handler().release()  # --exit-signal-handler was given
    args.exit_signal_handler = True
    global_vars._GLOBAL_SIGNAL_HANDLER = handler  # type: ignore[assignment]
    _keep_writer()
    return handler


def _keep_writer() -> None:
    """Let the process that carries write results during a save live as long as its rank.

    Slurm signals every process of a job step. Megatron's results queue lives in a process of its
    own (filesystem_async.get_write_results_queue), which SIGTERM would end before the save that
    the signal asks for. A process starts with the signal mask of the thread that starts it; and it
    would wait for ever for a rank that was killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original: Callable[..., Any] = filesystem_async.get_write_results_queue
    if getattr(original, "keeps", False):
        return

    @functools.wraps(original)
    def get_write_results_queue(*args: Any, **kwargs: Any) -> Any:
        resource_tracker.ensure_running()  # its own start would unblock SIGTERM
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGUSR2))
        start = managers.BaseManager.start
        tied = functools.partialmethod(start, end_with, (os.getpid(),))
        managers.BaseManager.start = tied  # type: ignore[method-assign, assignment]
        try:
            return original(*args, **kwargs)
        finally:
            managers.BaseManager.start = start  # type: ignore[method-assign]
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    get_write_results_queue.keeps = True  # type: ignore[attr-defined]
    filesystem_async.get_write_results_queue = get_write_results_queue
