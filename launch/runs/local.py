"""Runs a job's ranks on this machine: the same LaunchSpec, run folder and statuses as under Slurm.

May touch: child processes, the run folder, this process's handlers of SIGUSR1 and SIGTERM.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil

from launch.runs.progress import step_bar
from launch.runs.run_manifest import begin_attempt, end_attempt, locked
from launch.spec.launch_spec import Case, LaunchSpec
from megatron_mone.common.exit_status import INTERRUPTED, LEASE_LOST, STOPPED
from megatron_mone.common.local_ranks import Explain, explain, run_ranks

Watch = Callable[[Path], AbstractContextManager[None]]
"""Given a run's last log, held while its ranks run."""
_FORWARDED = (signal.SIGUSR1, signal.SIGTERM)


def check_local(spec: LaunchSpec) -> None:
    """Refuse what only a cluster has.

    Raises:
        ValueError: one line naming the field, the value and the fix.
    """
    if spec.nodes != 1:
        raise ValueError(f"nodes = {spec.nodes}: run starts ranks here only; use submit, or 1")
    if spec.array is not None:
        raise ValueError(f"array = {spec.array!r}: run has no job arrays; use submit, or --grid")
    if spec.container is not None:
        raise ValueError(
            f"container = {spec.container.kind}: run starts ranks without one; use submit, or run "
            "inside the container"
        )
    if spec.rendezvous_suffix is not None:
        raise ValueError(
            f"rendezvous_suffix = {spec.rendezvous_suffix!r}: ranks of run meet on this machine; "
            "use submit, or leave it out"
        )
    if spec.hostfile:
        raise ValueError("hostfile = True: ranks of run are on this machine; leave it out")
    for name in {"MASTER_ADDR", "MASTER_PORT"} & spec.environment.keys():
        raise ValueError(
            f"environment: {name} = {spec.environment[name]!r}: ranks of run meet on this machine; "
            "use submit, or leave it out"
        )
    if spec.modules:
        raise ValueError(f"modules = {', '.join(spec.modules)}: load them in the shell before run")


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Hold a run: only one process may run its ranks here.

    Raises:
        ValueError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{folder} is run by another process: wait for it, or give another --name"
    with locked(folder / ".running.lock", refusal):
        yield


def run_local(spec: LaunchSpec, watch: Watch = step_bar, failure: Explain = explain) -> int:
    """Run a job to its end, the cases of a grid one after another.

    SIGUSR1 and SIGTERM go on to the ranks, which save and exit 75.

    Args:
        spec: that `check_local` accepts, in a folder that the caller holds (`running`).
        watch: what a person sees meanwhile.
        failure: told of the first rank that failed.

    Returns:
        0, or the status of that rank.
    """
    cases = spec.cases or (Case(spec.folder, ()),)
    for case in cases:
        status = _run_case(spec, case, watch, failure)
        if status:
            return status
    return 0


def rank_command(spec: LaunchSpec, case: Case, attempt: str) -> list[str]:
    """What each rank runs: the program in its folder and with its environment, set by env(1)."""
    variables = {variable.name: variable.value for variable in spec.variables}
    variables |= spec.environment
    if spec.virtual_environment is not None:
        variables["VIRTUAL_ENV"] = spec.virtual_environment
        path = variables.get("PATH", os.environ.get("PATH", os.defpath))
        variables["PATH"] = f"{spec.virtual_environment}/bin:{path}"
    variables["MEGATRON_MONE_ATTEMPT"] = attempt
    variables["MEGATRON_MONE_PROGRESS"] = str(
        Path(case.folder).absolute() / "attempts" / f"{attempt}.progress"
    )
    settings = [f"{name}={value}" for name, value in variables.items()]
    # env takes what holds a = for a variable, also a program whose path does; the shell does not.
    start = ("sh", "-c", 'exec "$@"', "sh")
    return ["env", f"--chdir={spec.workdir}", *settings, *start, *spec.command, *case.arguments]


def _run_case(spec: LaunchSpec, case: Case, watch: Watch, failure: Explain) -> int:
    folder = Path(case.folder)
    job = f"local-{int(time.time())}-{os.getpid()}"
    attempt = f"{job}.0"
    begin_attempt(folder, job, attempt, socket.gethostname())
    status = INTERRUPTED
    try:
        logs = folder / "logs" / attempt
        last = logs / f"rank-{spec.ranks_per_node - 1:05d}.log"
        command = rank_command(spec, case, attempt)
        with _forwarding(), watch(last):
            status = run_ranks(command, spec.ranks_per_node, logs, failure)
    finally:
        end_attempt(folder, attempt, status, _reason(status))
    return status


def _reason(status: int) -> str:
    """The words of the job script for the same."""
    known = {
        0: "finished",
        STOPPED: "stopped after a checkpoint",
        LEASE_LOST: "another attempt took over",
        INTERRUPTED: "interrupted",
    }
    return known.get(status, f"failed with status {status}")


@contextmanager
def _forwarding() -> Iterator[None]:
    """Pass the stop signals on to the ranks, this process's only children."""

    def forward(number: int, frame: Any) -> None:
        for child in psutil.Process().children():
            # A rank that has ended needs no signal.
            try:
                child.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
