"""run and submit: a command line -> a job -> ranks here, or a batch script in Slurm's queue.

May touch: the run folder, child processes, Slurm through slurm/commands.py.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.runs.local import check_local, run_local, running
from launch.runs.run_commands import SCRIPT
from launch.runs.run_manifest import gather, locked, open_run, record_start
from launch.runs.submission import SUBMIT_LOCK, noted, refuse_if_submitted
from launch.slurm.commands import submit
from launch.slurm.environment import site_defaults
from launch.slurm.script import sbatch_script
from launch.spec.file import flag_fields, read_fields
from launch.spec.launch_spec import LaunchSpec
from launch.spec.training_job import Job, program_job, training_job
from megatron_mone.common.exit_status import STOPPED
from megatron_mone.common.files import atomic_write


def job_of(options: Any, rest: Sequence[str]) -> Job:
    """The job that a command line asks for.

    Args:
        options: before `--`.
        rest: after it.

    Raises:
        ValueError: one line naming the file or field, the value and the fix.
    """
    _check_sweep(options)
    site = site_of(options)
    if options.config is not None:
        return training_job(options.config, options.name, options.runs, rest, options.grid, site)
    if options.grid:
        raise ValueError(f"--grid {options.grid[0]} needs --config: it names arguments of training")
    return program_job(options.name, options.runs, rest, site)


def site_of(options: Any) -> dict[str, Any]:
    """The fields that the launch file sets, flags over them, SBATCH_* below; says of these.

    Raises:
        ValueError: one line naming the file or field, the value and the fix.
    """
    below = read_fields(options.launch or ("local" if is_local(options) else "slurm"))
    given = {**below, **flag_fields(options, below)}
    if is_local(options):
        return given
    defaults, lines = site_defaults(os.environ, given)
    for line in lines:
        print(f"megatron-mone: {line}", file=sys.stderr)
    return {**defaults, **given}


def is_local(options: Any) -> bool:
    """Whether the ranks start on this machine."""
    return options.action == "run" or options.here


def start_run(job: Job, options: Any) -> int:
    """Run a job's ranks here to their end; returns their status.

    Raises:
        ValueError: it needs a cluster, runs already, or its folder holds another run.
    """
    refuse_judgement(options)
    check_local(job.spec)
    with begun(job):
        ranks = job.spec.ranks_per_node
        print(f"{job.spec.name}: {ranks} ranks here, logs in {job.spec.folder}", flush=True)
        status = run_local(job.spec)
    if status == STOPPED:
        print(f"{job.spec.name}: stopped after a checkpoint; the same command goes on")
    return status


@contextmanager
def begun(job: Job) -> Iterator[None]:
    """Hold a run of one job while its ranks run here; its manifest has the start and the attempts.

    Raises:
        ValueError: it runs already, or its folder holds another run.
    """
    folder = Path(job.spec.folder)
    with running(folder):
        start = {"ranks": job.spec.ranks_per_node}
        record_start(folder, job.spec.name, job.config, job.data, start)
        try:
            yield
        finally:
            gather(folder)


def refuse_judgement(options: Any) -> None:
    """Refuse what asks for a batch script where there is none.

    Raises:
        ValueError: --dry-run or --test-only.
    """
    if options.dry_run or options.test_only:
        raise ValueError("--dry-run and --test-only are for submit: run has no batch script")


def submit_run(job: Job, options: Any) -> None:
    """Hand a job to Slurm and print its id and log; or print the script, or Slurm's judgement.

    Raises:
        ValueError: Slurm refuses it, or its folder holds another run.
        SlurmUnavailable: Slurm does not answer.
    """
    script = sbatch_script(job.spec)
    if options.dry_run:
        print(script, end="")
        return
    if options.test_only:
        print(judged(script))
        return
    folder = Path(job.spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / SUBMIT_LOCK):  # sbatch reads the script that this process wrote
        refuse_if_submitted(folder)
        path = prepare_folder(job, job.spec, script)
        with noted(folder, {"ranks": job.spec.nodes * job.spec.ranks_per_node}) as send:
            job_id = send(path)
            star = "_*" if job.spec.array or job.spec.cases else ""
            print(f"job {job_id}, log {folder}/logs/{job_id}{star}.log", flush=True)


def judged(script: str) -> str:
    """Slurm's judgement of a batch script that is not submitted."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / SCRIPT
        path.write_text(script, encoding="utf-8")
        return submit(path, test_only=True)


def prepare_folder(job: Job, spec: LaunchSpec, script: str) -> Path:
    """Make the run folder with what Slurm opens before the script runs; returns the script's path.

    Args:
        job: to be submitted.
        spec: of it, with all cases of its folder.
        script: of `spec`.

    Raises:
        ValueError: the folder holds a run of another config.
    """
    folder = Path(spec.folder)
    open_run(folder, spec.name, job.config, job.data)
    for place in (folder, *(Path(case.folder) for case in spec.cases)):
        (place / "logs").mkdir(parents=True, exist_ok=True)
    atomic_write(folder / SCRIPT, script.encode())
    return folder / SCRIPT


def _check_sweep(options: Any) -> None:
    if options.here and options.action != "sweep":
        raise ValueError(f"--here is for sweep; {options.action} has its own place")
    if options.action == "sweep" and not options.grid:
        raise ValueError("--grid is missing: a sweep needs one, such as --grid r=1/2,1/4")
