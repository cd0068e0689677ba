"""No process outlives the one that started it, however that one ends.

A process that is killed can end nothing, a signal to a group misses those in other sessions, and a
pipe's end is seen only by who reads it. So each child has the kernel send it SIGKILL when its
parent ends, and a tree of processes comes down link by link. Where a program that is not ours
stands between (torchrun), a variable of the environment tells the process below it to do the same.
Imports nothing heavy. May touch: this process's death signal, os.environ.
"""

import ctypes
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

STARTER_VARIABLE = "MEGATRON_MONE_STARTER"
"""Names the process, above the reader's parent or it, without which the reader is not to run."""
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here: not between a fork and an exec


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends; call it in a child, right after the fork.

    The kernel counts the end of the thread that forked for the end of the parent, and keeps to the
    promise through exec, but not for the children of this process.

    Args:
        parent: process id that the parent knows of itself. Where it has ended already, this
            process ends here.
    """
    _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def tied() -> Callable[[], None]:
    """`preexec_fn` of a child process that ends with this one: `Popen(..., preexec_fn=tied())`.

    Start it from a thread that lives as long as it may.
    """
    return functools.partial(end_with, os.getpid())


def end_with_starter() -> None:
    """End with our parent, if the environment says so; commands and ranks call it as they start.

    Makefile, the demo and the starter of local ranks name themselves in STARTER_VARIABLE, which is
    taken out, so that it holds for one generation of our processes. torchrun, which waits for its
    ranks but does not end them when it is killed, is known by a variable of its own.
    """
    starter = os.environ.pop(STARTER_VARIABLE, None)
    if starter is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())
    # Parents may have ended before; whoever adopted this process is not told from one by its id.
    if starter is not None and not Path("/proc", starter).exists():
        raise SystemExit(f"megatron-mone: {STARTER_VARIABLE} = {starter} has ended: so do I")


def named_here() -> dict[str, str]:
    """STARTER_VARIABLE with this process as its value, for the environment of a child."""
    return {STARTER_VARIABLE: str(os.getpid())}
