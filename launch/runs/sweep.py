"""sweep: run the cases of a grid that are missing, here or as elements of a Slurm job array.

May touch: the run folder, child processes, Slurm through slurm/commands.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.runs.local import check_local, run_local, running
from launch.runs.run_manifest import check_config, gather, locked, record_start
from launch.runs.start_commands import is_local, prepare_folder, refuse_judgement, submit_run
from launch.runs.submission import SUBMIT_LOCK, noted, recover
from launch.runs.sweep_cases import grown, numbers_of, read_cases, write_cases
from launch.runs.sweep_plan import Plan, elements, plan_of
from launch.runs.sweep_results import show_results
from launch.slurm.commands import SlurmRefused
from launch.slurm.script import sbatch_script
from launch.spec.launch_spec import LaunchSpec
from launch.spec.training_job import Job, grid_cases
from megatron_mone.common.exit_status import INTERRUPTED, STOPPED


def start_sweep(job: Job, options: Any, judge: Callable[[Job], None]) -> int:
    """Run or submit what is missing of a grid; prints the table where nothing more will run.

    Args:
        job: with points.
        options: of the command line.
        judge: refuses cases before they are submitted.

    Returns:
        0, or the status of the first case that did not finish here.

    Raises:
        ValueError: as `submit_sweep` and `run_sweep`.
        SlurmUnavailable: as they do.
    """
    if is_local(options):
        refuse_judgement(options)
        status = run_sweep(job)
        show_results(Path(job.spec.folder))
        return status
    if options.dry_run:
        submit_run(job, options)
    elif options.test_only:
        judge(job)
        submit_run(job, options)
    elif not submit_sweep(job, judge):
        show_results(Path(job.spec.folder))
    return 0


def plan(folder: Path, job: Job) -> Plan:
    """Decide what is missing; the caller holds the folder's locks.

    Raises:
        ValueError: the folder holds another run, or a record of it cannot be read.
        SlurmUnavailable: Slurm does not answer on a case that it may still run.
    """
    check_config(folder, job.config)
    cases = grown(read_cases(folder), job.points)
    return plan_of(folder, cases, numbers_of(cases, job.points))


def submit_sweep(job: Job, judge: Callable[[Job], None]) -> bool:
    """Submit the missing cases as one job array; says what it did in a line or two.

    Args:
        job: with points.
        judge: refuses cases before they are submitted.

    Returns:
        Whether anything was submitted.

    Raises:
        ValueError: Slurm refuses, the run is under way here, or its folder holds another.
        SlurmUnavailable: Slurm does not answer.
    """
    folder = Path(job.spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The second who starts the same sweep waits, then sees the first one's job.
    with locked(folder / SUBMIT_LOCK):
        with running(folder):
            recover(folder)
            todo = plan(folder, job)
            if not todo.missing:
                print(todo.summary(""))
                return False
            spec = replace(job.spec, cases=grid_cases(folder, todo.cases, job.config))
            missing = tuple(spec.cases[number] for number in todo.missing)
            judge(replace(job, spec=replace(spec, cases=missing)))
            before = read_cases(folder)
            write_cases(folder, todo.cases)
            script = prepare_folder(job, spec, sbatch_script(spec))
            ranks = spec.nodes * spec.ranks_per_node
            try:
                with noted(folder, {"ranks": ranks, "cases": list(todo.missing)}) as send:
                    job_id = send(script, elements(todo.missing))
            except SlurmRefused:
                write_cases(folder, before)  # no case for what was never queued
                raise
    print(todo.summary(f"submitted: job {job_id}"))
    print(f"job {job_id}, log {folder}/logs/{job_id}_*.log", flush=True)
    return True


def run_sweep(job: Job) -> int:
    """Run the missing cases here, one after another; one that fails does not stop the others.

    Returns:
        0, or the status of the first case that did not finish.

    Raises:
        ValueError: it needs a cluster, is run by another process, or its folder holds another run.
        SlurmUnavailable: Slurm does not answer on a case that it may still run.
    """
    check_local(job.spec)
    folder = Path(job.spec.folder)
    with running(folder):
        with locked(folder / SUBMIT_LOCK):
            recover(folder)
            todo = plan(folder, job)
            if todo.missing:
                write_cases(folder, todo.cases)
                start = {"ranks": job.spec.ranks_per_node, "cases": list(todo.missing)}
                record_start(folder, job.spec.name, job.config, job.data, start)
        spec = replace(job.spec, cases=grid_cases(folder, todo.cases, job.config))
        print(todo.summary(f"run here, logs in {folder}/cases"), flush=True)
        try:
            return _run_each(spec, todo)
        finally:
            if todo.missing:
                gather(folder)


def _run_each(spec: LaunchSpec, todo: Plan) -> int:
    first = 0
    for number in todo.missing:
        print(f"case {number:03d}: {todo.cases[number].label}", flush=True)
        status = run_local(replace(spec, cases=(spec.cases[number],)))
        first = first or status
        if status in (STOPPED, INTERRUPTED):  # meant for the sweep: the user stops it
            break
    return first
