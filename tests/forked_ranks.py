"""Ranks that start in milliseconds: a process that imported Megatron once a session forks them.

Torch and Megatron take a rank five seconds of processor time to import. Here multiprocessing's fork
server imports them once (tests/rank_imports.py) and forks a launcher for each job, which forks the
job's ranks and ends when they have ended, like torchrun.
"""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_mone.common.child_processes import end_with, named_here
from megatron_mone.common.local_ranks import free_port

ROOT = Path(__file__).resolve().parent.parent
_STARTS = threading.Lock()  # a start changes this process's environment for a while
SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}


def command(module: str, words: list[str]) -> NoReturn:
    """For `start`: a command of `megatron_mone.commands` as torchrun starts it on a rank."""
    sys.exit(importlib.import_module(f"megatron_mone.commands.{module}").main(words))


class Launch:
    """A started job, used like a `subprocess.Popen` of torchrun: its ranks are its children."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        """0, 1 if a rank failed, -N if signal N killed the launcher; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """`returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: the job runs on.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("forked ranks", timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL the launcher; its ranks die with it."""
        self._process.kill()


def start(
    ranks: int, run: Callable[..., None], arguments: tuple, log: Path, *, fresh: bool = False
) -> Launch:
    """Fork the ranks, which call `run(*arguments)` with torchrun's variables in the environment.

    Args:
        ranks: how many.
        run: a function of an importable module.
        arguments: what pickle takes.
        log: file for all that the launcher and the ranks print.
        fresh: start from a new interpreter, in which the module of `run` or of an argument can
            change what Megatron finds when it is imported.

    Several threads may start jobs; the fork server ends with the thread that starts the first.
    """
    log.write_bytes(b"")
    with _STARTS:
        return _start(ranks, run, arguments, log, fresh)


def _start(
    ranks: int, run: Callable[..., None], arguments: tuple, log: Path, fresh: bool
) -> Launch:
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    settings = {**SETTINGS, **named_here()}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)  # for the imports of the fork server, which this may start
    try:
        if not fresh:
            context.set_forkserver_preload(["tests.rank_imports"])
        environment = dict(os.environ)
        process = context.Process(
            target=_launcher, args=(ranks, run, arguments, str(log), environment)
        )
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return Launch(process)


def _launcher(
    ranks: int, run: Callable[..., None], arguments: tuple, log: str, environment: dict[str, str]
) -> None:
    parent = os.getppid()
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    end_with(parent)
    from tests.rank_imports import SET_BY_IMPORTS  # in a fresh interpreter, still before the forks

    os.environ.clear()
    os.environ.update({**SET_BY_IMPORTS, **environment})
    multiprocessing.set_start_method("fork", force=True)  # the default, as in a rank of torchrun
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    launcher, left = os.getpid(), set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            end_with(launcher)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            _rank(run, arguments)
        left.add(pid)
    sys.exit(_wait(left))


def _wait(left: set[int]) -> int:
    """0 once all have ended well; a rank that fails takes the others with it."""
    failed = 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and not failed:
            failed = 1
            print(f"rank {pid} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            for other in left:
                os.kill(other, signal.SIGKILL)
    return failed


def _rank(run: Callable[..., None], arguments: tuple) -> NoReturn:
    status: Any = 1
    try:
        run(*arguments)
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
