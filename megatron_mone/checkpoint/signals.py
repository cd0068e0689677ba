"""SIGTERM and SIGUSR1 to any one rank: all ranks save after the step under way and exit 75.

Megatron's `--exit-signal-handler` gathers a flag over the ranks once a step, saves, and exits with
status 0, which a scheduler cannot tell from a finished run; and it knows one signal. Here it gets
two signals and a status, and a signal during start-up is kept until the first step. The same flag
tells all ranks that rank 0 lost the checkpoint folder (ownership.py): they stop there, with no
save. May touch: this process's signal handlers, Megatron's global handler.
"""

import functools
import os
import signal
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import managers, resource_tracker
from typing import Any

from megatron.training import global_vars
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_mone.checkpoint import ownership
from megatron_mone.checkpoint.lease.lease import LeaseLostError
from megatron_mone.common.child_processes import end_with
from megatron_mone.common.patch import Replaced, wrapping

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOST = 2
"""What a rank's flag says in place of 0 or 1 when the checkpoint folder is lost."""


class StopHandler(DistributedSignalHandler):
    """Megatron's handler, listening to several signals and remembering that one stopped the run."""

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        super().__init__(signals[0])
        self.numbers = signals
        self.released = False
        self.stopped = False
        self._signal_received: int = False  # type: ignore[assignment]
        self.undo = ExitStack()
        for number in signals:
            self.undo.callback(signal.signal, number, signal.signal(number, self._receive))

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
        """Give the signals back to whoever had them, and Megatron its own handler."""
        self.undo.close()
        return True

    def end_process(self) -> None:
        """Be deaf from here to the process's end, which has a status to tell.

        Python gives up its handlers before it ends, and srun sends a signal again where a node was
        slow to confirm it: it would end a rank that had saved, in place of its exit with 75.
        """
        for number in self.numbers:
            signal.signal(number, signal.SIG_IGN)


def arm(args: Namespace) -> StopHandler:
    """Listen from now on, and let Megatron ask this handler.

    Call it from the main thread, when Megatron's arguments are validated: by then its global state
    exists, without a handler unless --exit-signal-handler was given.
    """
    if getattr(global_vars, "_GLOBAL_SIGNAL_HANDLER", None) is not None:
        global_vars.get_signal_handler().release()  # --exit-signal-handler was given
    handler = StopHandler(tuple(dict.fromkeys((*SIGNALS, args.exit_signal))))
    args.exit_signal_handler = True
    handler.undo.enter_context(Replaced(global_vars, "_GLOBAL_SIGNAL_HANDLER", handler))
    return handler


def _kept_alive(get_write_results_queue: Callable[..., Any]) -> Callable[..., Any]:
    """A process starts with the signal mask of the thread that starts it; and without its tie the
    queue's would wait for ever for a rank that was killed."""

    @functools.wraps(get_write_results_queue)
    def kept_alive(*args: Any, **kwargs: Any) -> Any:
        resource_tracker.ensure_running()  # its own start would unblock SIGTERM
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGUSR2))
        start = functools.partialmethod(managers.BaseManager.start, end_with, (os.getpid(),))
        try:
            with Replaced(managers.BaseManager, "start", start):
                return get_write_results_queue(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return kept_alive


PATCHES = (
    wrapping(
        "results-queue",
        "megatron.core.dist_checkpointing.strategies.filesystem_async: get_write_results_queue",
        _kept_alive,
        why="Slurm signals every process of a job step, and SIGTERM would end the process that the "
        "queue of an asynchronous save lives in before the save that the signal asks for",
        needed_while="ctx.Manager().Queue()",
    ),
)
