"""What became of a job, by whichever of Slurm's records knows it. Why one waits: reasons.py.

Reads through commands.py and touches nothing. The queue answers first (`squeue --json`; without
JSON that can be read `scontrol show job`), then, for what it no longer holds, accounting (sacct),
then the file of ended jobs (`sacct --completion`), so that a cluster without slurmdbd is read too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.slurm import commands as slurm_commands
from launch.slurm.commands import SlurmUnavailable, Unreadable
from launch.slurm.records import (
    JobState,
    array_tasks,
    from_json,
    from_oneliner,
    from_sacct,
    ids_in_json,
    output_in_json,
    output_in_oneliner,
)

# Ends of one start of a job after which Slurm may have started it again.
STARTED_AGAIN = frozenset(("NODE_FAIL", "PREEMPTED", "REQUEUED"))


def job_states(job_ids: Sequence[str]) -> list[JobState]:
    """The state of jobs, in the order asked; an array gives one entry a task (waiting tasks: one).

    A job that nobody knows any more has no entry: without slurmdbd that is any job some minutes
    after its end, and always the tasks of an array, whose numbers `sacct --completion` loses.

    Args:
        job_ids: "123", or "123_4" for one task of an array (while it waits, the entry of all that
            wait).

    Raises:
        SlurmUnavailable: the controller does not answer, or a job is not in the queue and
            accounting does not answer.
        ValueError: not a job id.
    """
    if not job_ids:
        return []
    queued = _queued(job_ids)
    found = {job.label: job for job in queued if any(_asked(job, j) for j in job_ids)}
    # The queue forgets a task some minutes after its end, while the array's others go on.
    missing = [j for j in job_ids if not any(_asked(job, j) for job in found.values())]
    arrays = {job.job_id for job in found.values() if job.array_task}
    if missing or arrays:
        for job in _ended(missing, sorted(arrays)):
            found.setdefault(job.label, job)
    return [job for j in dict.fromkeys(job_ids) for job in found.values() if _asked(job, j)]


def unfinished_jobs_in(folder: Path) -> list[str]:
    """Ids of jobs, of any user, that wait or run and write their output into a folder or below it.

    Raises:
        SlurmUnavailable: the controller does not answer.
    """
    place = folder.resolve()

    def texts() -> list[str]:
        shown = slurm_commands.show_job()
        return [text for text in shown if place in Path(output_in_oneliner(text)).parents]

    ours = _read((), lambda r: place in Path(output_in_json(r)).parents, texts)
    return list(dict.fromkeys(job.job_id for job in ours if not job.finished))


def _queued(job_ids: Sequence[str]) -> list[JobState]:
    """What the queue holds of some jobs, and maybe of others: squeue's word, else scontrol's."""
    numbers = {int(job_id.partition("_")[0]) for job_id in job_ids}

    def may_be_asked(record: dict[str, Any]) -> bool:
        own, array = ids_in_json(record)
        return own is None or own in numbers or array in numbers

    def texts() -> list[str]:
        return [text for job_id in job_ids for text in slurm_commands.show_job(job_id)]

    return _read(job_ids, may_be_asked, texts)


def _read(
    job_ids: Sequence[str],
    wanted: Callable[[dict[str, Any]], bool],
    texts: Callable[[], list[str]],
) -> list[JobState]:
    """The wanted jobs of squeue's JSON; where it gives none that can be read, of scontrol's texts.

    Raises:
        SlurmUnavailable: neither can be read; says of both what they printed.
    """
    why = ""
    try:
        records = slurm_commands.queue(job_ids)
        if records is not None:
            return [from_json(record) for record in records if wanted(record)]
    except Unreadable as error:
        why = f"{error}; "
    try:
        return [from_oneliner(text) for text in texts()]
    except SlurmUnavailable as error:
        raise SlurmUnavailable(f"{why}{error}") from error


def _asked(job: JobState, job_id: str) -> bool:
    base, _, task = job_id.partition("_")
    if base != job.job_id:
        return False
    return task in ("", job.array_task) or (
        task.isdigit() and int(task) in array_tasks(job.array_task)
    )


def _ended(missing: Sequence[str], arrays: Sequence[str]) -> Iterator[JobState]:
    try:
        rows = slurm_commands.accounting([*missing, *arrays])
    except SlurmUnavailable:
        if missing:
            raise
        return
    if rows is None:
        completed = slurm_commands.completions(missing) if missing else []
        # A row without a state is one whose name sacct took apart at a space.
        yield from (from_sacct(row) for row in completed if row["State"])
        return
    last: dict[str, JobState] = {}
    for row in rows:
        job = from_sacct(row)
        before = last.get(job.label)
        again = before is not None and before.state in STARTED_AGAIN
        last[job.label] = replace(job, restarts=before.restarts + 1) if before and again else job
    for job in last.values():
        if job.finished or any(_asked(job, j) for j in missing):
            yield job
