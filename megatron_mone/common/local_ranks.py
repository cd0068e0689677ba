"""Starts the ranks of a job on this machine and waits for them; the first that fails ends all.

What ranks say goes to log files; rank 0 has `terminal()` for what a person is to see. Where this
process is killed, they end with it. May touch: child processes, the log folder.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

from megatron_mone.common.child_processes import named_here, tied
from megatron_mone.common.command_line import ERROR
from megatron_mone.common.surroundings import without_ranks

TERMINAL = "MEGATRON_MONE_TERMINAL_FD"
GRACE_SECONDS = 10.0
_LAST_LINES = 15


Explain = Callable[[Sequence[Path], int], None]
"""Told (the log of each rank, the rank that failed) when all have ended."""


def explain(logs: Sequence[Path], failed: int) -> None:
    """Why a rank failed, on stderr: the line in which a rank says so, or the end of its log."""
    said = error_line(logs)
    print(
        said or f"rank {failed} failed; the end of {logs[failed]}:\n{last_lines(logs[failed])}",
        file=sys.stderr,
    )


def run_ranks(command: Sequence[str], ranks: int, logs: Path, failure: Explain = explain) -> int:
    """Run `command` once a rank, with the variables that torch.distributed reads.

    Args:
        command: program and arguments, the same for every rank.
        ranks: how many.
        logs: folder; rank-NNNNN.log of each rank is written anew.
        failure: told of it.

    Returns:
        0, or the exit status of the first rank that failed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        processes = []
        port, terminal_fd = free_port(), os.dup(sys.stderr.fileno())
        files.callback(os.close, terminal_fd)
        for rank in range(ranks):
            log = files.enter_context((logs / f"rank-{rank:05d}.log").open("w"))
            environment = _environment(rank, ranks, port)
            if rank == 0:
                environment[TERMINAL] = str(terminal_fd)
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    pass_fds=(terminal_fd,),
                    process_group=0,  # Ctrl-C is for this process, which asks them to save and end
                    preexec_fn=tied(),
                )
            )
        try:
            failed = _first_failure(processes)
        finally:
            _stop(processes)
    if failed is None:
        return 0
    failure([logs / f"rank-{rank:05d}.log" for rank in range(ranks)], failed)
    status = processes[failed].returncode
    return status if status > 0 else 128 - status  # ended by a signal, as a shell says it


def terminal() -> TextIO:
    """Where rank 0 writes what a person is to see: the starter's stderr, or its own."""
    number = os.environ.get(TERMINAL)
    return sys.stderr if number is None else os.fdopen(int(number), "w", closefd=False)


def error_line(logs: Iterable[Path]) -> str:
    """The first line of some logs in which a rank says what is wrong; empty where none does."""
    for log in logs:
        with log.open(errors="replace") as lines:
            for line in lines:
                if line.startswith(ERROR):
                    return line.rstrip()
    return ""


def last_lines(log: Path) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONWARNINGS": "ignore",
    }
    named = {**named_here(), **{name: str(value) for name, value in own.items()}}
    return {**without_ranks(os.environ), **named}


def _first_failure(processes: Sequence[subprocess.Popen]) -> int | None:
    """The rank that ended with an error, as soon as one has; None when all ended well."""
    while True:
        statuses = [process.poll() for process in processes]
        for rank, status in enumerate(statuses):
            if status:
                return rank
        if all(status == 0 for status in statuses):
            return None
        time.sleep(0.05)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """End what still runs: asked first, then killed."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on.

    It is none of those that the kernel gives to connections: one of many thousands that ranks open
    would take it, now and then, before the rank listens that it is for.
    """
    lowest, beyond = 10_000, _connections_first_port()
    for _ in range(100):
        # Not by `random`: processes that start together may have one seed.
        port = lowest + secrets.randbelow(beyond - lowest) if beyond > lowest else 0
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return int(s.getsockname()[1])
    raise OSError(f"no free TCP port was found from {lowest} to {beyond}")


def _connections_first_port() -> int:
    """The lowest port that the kernel gives to a connection; 0 where it does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return 0
