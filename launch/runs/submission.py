"""Handing a script to sbatch so that a launcher that dies in between loses no job.

    runs/NAME/.submitting    what the manifest is to say of a start whose job is not noted there yet

Who finds this mark while nobody holds the folder's lock asks Slurm for jobs that write their log
into the run folder. May touch: the run folder, Slurm through slurm/commands.py.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from launch.runs.run_manifest import add_start, gather, locked, read_mapping, stamped
from launch.slurm.commands import (
    CHANGE_SECONDS,
    SlurmAbsent,
    SlurmRefused,
    SlurmUnavailable,
    submit,
)
from launch.slurm.state import unfinished_jobs_in
from megatron_mone.common.files import write_json

SUBMIT_LOCK = ".submit.lock"
"""Held from deciding what to submit until it is noted."""
MARK = ".submitting"
Send = Callable[..., str]


@contextmanager
def noted(folder: Path, start: Mapping[str, Any]) -> Iterator[Send]:
    """`with noted(...) as send: job_id = send(script)`: the job is in the manifest afterwards.

    The caller holds SUBMIT_LOCK. Where Slurm gave no answer the mark stays: it may have the job.

    Args:
        folder: run folder with its manifest.
        start: JSON mapping about this start; the time, the code and the job's id are added.

    Yields:
        `send(script, options=())`, as `slurm_commands.submit`; to be called once.

    Raises:
        SlurmRefused, SlurmAbsent: nothing was submitted.
        SlurmUnavailable: see above.
    """
    mark = folder / MARK
    facts = stamped(start)
    write_json(mark, facts)
    sent: list[str] = []

    def send(script: Path, options: Sequence[str] = ()) -> str:
        try:
            sent.append(submit(script, options=options))
        except (SlurmRefused, SlurmAbsent):
            mark.unlink()
            raise
        return sent[0]

    try:
        yield send
    finally:
        if sent:
            add_start(folder, {**facts, "job_id": sent[0]})
            mark.unlink()


def recover(folder: Path) -> list[str]:
    """Note what a launcher submitted and did not live to note; the caller holds SUBMIT_LOCK.

    Returns:
        Ids of the jobs found that have not ended; those that have begun note themselves.

    Raises:
        SlurmUnavailable: Slurm does not answer; the mark stays.
        ValueError: the mark or the manifest cannot be read.
    """
    mark = folder / MARK
    if not mark.exists():
        return []
    facts = read_mapping(mark)
    if not isinstance(facts.get("time"), int):
        raise ValueError(f"{mark} says no time of a submission: see `squeue --me`, then delete it")
    known = {start.get("job_id") for start in gather(folder).starts}
    found = [job_id for job_id in unfinished_jobs_in(folder) if job_id not in known]
    for job_id in found:
        add_start(folder, {**facts, "job_id": job_id})
    # An sbatch that outlives its launcher may still be under way.
    if found or time.time() - facts["time"] > CHANGE_SECONDS:
        mark.unlink()
    return found


def recover_if_free(folder: Path) -> str:
    """As `recover`, for who only looks: not now if somebody is submitting or Slurm is silent.

    Returns:
        Why a submission is not known to be over, after "no job is known: "; empty where it is.

    Raises:
        ValueError: the mark or the manifest cannot be read.
    """
    if not (folder / MARK).exists():
        return ""
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / SUBMIT_LOCK, "held"))
        except ValueError:
            return "it is being submitted"
        try:
            recover(folder)
        except SlurmUnavailable as error:
            return f"its submission was cut short, and Slurm does not say what came of it; {error}"
    return "its submission was cut short just now" if (folder / MARK).exists() else ""


def refuse_if_submitted(folder: Path) -> None:
    """As `recover`, before a run is submitted once more.

    Raises:
        ValueError: there is such a job.
        SlurmUnavailable: as `recover`.
    """
    if found := recover(folder):
        raise ValueError(
            f"job {', '.join(found)} of {folder.name} is in the queue: the launcher that sent it "
            "ended before it could note it, and it is noted now; cancel it first to submit again"
        )
