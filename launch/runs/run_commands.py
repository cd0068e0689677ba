"""status, logs, cancel and resume of runs that were started or submitted.

A run is named by its folder's name or by the id of a job. May touch: the manifests of runs, Slurm
through slurm/commands.py.
"""

import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from launch.runs.run_manifest import MANIFEST, RunManifest, gather, locked
from launch.runs.submission import SUBMIT_LOCK, noted, recover, recover_if_free
from launch.runs.sweep_cases import case_states, read_cases, runs_here
from launch.runs.sweep_plan import is_sweep, resume_sweep
from launch.slurm.commands import SlurmUnavailable, cancel
from launch.slurm.reasons import why_waiting
from launch.slurm.state import job_states
from megatron_mone.common.child_processes import tied
from megatron_mone.common.spelling import nearest_name

SCRIPT = "job.sbatch"
_TAIL_LINES = "40"


def find_run(runs: Path, text: str) -> tuple[Path, str | None]:
    """The folder of a run and the job meant; None where it never was a job.

    Args:
        runs: folder of run folders.
        text: a run's name (its last job is meant) or a job's id.

    Raises:
        ValueError: no such run, with the nearest known name.
    """
    folders = _folders(runs)
    # By name first: what is wrong in another run's folder does not matter then.
    for folder in sorted(folders, key=lambda folder: folder.name != text):
        recover_if_free(folder)
        jobs = _jobs(gather(folder))
        if folder.name == text:
            return folder, jobs[-1] if jobs else None
        if text.partition("_")[0] in jobs:
            return folder, text
    known = [folder.name for folder in folders]
    raise ValueError(
        f"{text!r} is neither a run nor a job of {runs}{nearest_name(text, known)}: give --runs, "
        "or a name that `python -m launch status` lists"
    )


def status_lines(runs: Path, names: Sequence[str]) -> list[str]:
    """A line for each run: what it does now, how often it was started, how the last start ended.

    Args:
        runs: folder of run folders.
        names: runs or jobs; none: all runs.

    Raises:
        ValueError: no such run.
    """
    folders = [find_run(runs, name)[0] for name in names] or _folders(runs)
    return [line for folder in folders for line in _lines(folder)]


def show_logs(runs: Path, name: str, follow: bool) -> int:
    """The end of a job's log and of the logs of its last attempt's first and last rank.

    Args:
        runs: folder of run folders.
        name: a run or a job.
        follow: go on with what is written, until interrupted.

    Returns:
        The status of tail(1).

    Raises:
        ValueError: no such run, or nothing was written yet.
    """
    folder, job = find_run(runs, name)
    files = sorted(folder.glob(f"logs/{job}.log")) + sorted(folder.glob(f"logs/{job}_*.log"))
    # Of a job array all elements, 42_0 and so on, or the one that was named.
    found = gather(folder).attempts
    attempts = [a for a in found if not job or job in (a["job_id"], a["job_id"].split("_")[0])]
    if attempts:
        case = f"cases/{attempts[-1]['case']}" if "case" in attempts[-1] else "."
        ranks = sorted((folder / case / "logs" / attempts[-1]["attempt"]).glob("rank-*.log"))
        files += [*ranks[:1], *ranks[1:][-1:]]  # Megatron prints losses on the last rank
    if not files:
        raise ValueError(f"{name}: nothing was written to {folder / 'logs'} yet")
    flags = ["-F"] if follow else []
    command = ["tail", "-n", _TAIL_LINES, *flags, "--", *map(str, files)]
    return subprocess.run(command, check=False, preexec_fn=tied()).returncode


def cancel_run(runs: Path, name: str) -> list[str]:
    """End the job that was named, or all jobs of a run that Slurm still has; returns their ids.

    Raises:
        ValueError: no such run, or one that Slurm does not run.
        SlurmUnavailable: Slurm does not answer.
    """
    folder, job = find_run(runs, name)
    if job is None:
        raise ValueError(
            f"{folder.name} is no job of Slurm: end its process on the machine it is on"
        )
    jobs = [job]
    if name == folder.name:  # a sweep that has grown, or was resumed, has several
        states = job_states(_jobs(gather(folder)))
        jobs = list(dict.fromkeys(state.job_id for state in states if not state.finished))
    for one in jobs:
        cancel(one)
    return jobs


def resume_run(runs: Path, name: str) -> str | None:
    """Submit a run's script once more; it goes on from its last checkpoint.

    Of a sweep the missing cases alone, or the one that was named.

    Returns:
        The job's id; None where no case of a sweep is missing.

    Raises:
        ValueError: no such run, it was never submitted, or its job has not ended.
    """
    folder, job = find_run(runs, name)
    if job is None or not (folder / SCRIPT).exists():
        raise ValueError(f"{folder.name} was never submitted: start it again as it was started")
    if is_sweep(folder):
        return resume_sweep(folder, folder / SCRIPT, name if name != folder.name else None)
    with locked(folder / SUBMIT_LOCK):  # who resumes it at the same time sees this one's job
        recover(folder)
        manifest = gather(folder)
        job = _jobs(manifest)[-1]
        unfinished = [state for state in job_states([job]) if not state.finished]
        if unfinished:
            raise ValueError(
                f"job {job} of {folder.name} is {unfinished[0].state}: wait for it, or cancel it "
                "first"
            )
        with noted(folder, {"ranks": manifest.starts[-1]["ranks"]}) as send:
            return send(folder / SCRIPT)


def _folders(runs: Path) -> list[Path]:
    return sorted(path.parent for path in runs.glob(f"*/{MANIFEST}"))


def _jobs(manifest: RunManifest) -> list[str]:
    return [start["job_id"] for start in manifest.starts if "job_id" in start]


def _lines(folder: Path) -> list[str]:
    not_over = recover_if_free(folder)
    manifest = gather(folder)
    jobs, attempts = _jobs(manifest), manifest.attempts
    times = f"{len(attempts)} attempt{'s' if len(attempts) != 1 else ''}"
    ended = [attempt["reason"] for attempt in attempts if attempt["end"] is not None]
    last = f", the last to end: {ended[-1]}" if ended else ""
    head = _sweep_line(folder, manifest) if is_sweep(folder) else []
    if not manifest.starts:
        return [*head, f"{folder.name}: no job is known: {not_over or 'Slurm accepted none'}"]
    if "job_id" not in manifest.starts[-1]:
        here = "running here" if runs_here(folder) else "not running here"
        return [*head, f"{folder.name}: {here}; {times}{last}"]
    try:
        states = job_states(jobs)
    except SlurmUnavailable as error:
        return [*head, f"{folder.name}: job {jobs[-1]}, state unknown; {times}{last}; {error}"]
    # Of the jobs before the last only those that still run: a sweep that has grown has several.
    shown = [state for state in states if not state.finished or state.job_id == jobs[-1]]
    if not shown:
        return [*head, f"{folder.name}: job {jobs[-1]}, no longer known to Slurm; {times}{last}"]
    lines = [f"{folder.name}: job {state.label} {state.state}; {times}{last}" for state in shown]
    return [*head, *lines, *(why for state in shown if (why := why_waiting(state)))]


def _sweep_line(folder: Path, manifest: RunManifest) -> list[str]:
    """How many cases of a sweep are in each state."""
    cases = read_cases(folder)
    states = case_states(folder, cases, manifest.starts, here=runs_here(folder), sure=False)
    counts = Counter(state.state for state in states)
    return [
        f"{folder.name}: {len(cases)} cases: "
        + ", ".join(f"{number} {state}" for state, number in counts.items())
    ]
