"""The cases of a sweep and how far each is: sweep.json, the attempts on disk, Slurm.

    runs/NAME/sweep.json    {"schema", "cases": [{"values": {...}, "flags": [...]}, ...]}

A case is its values; its number is its place in the file, which only grows, so that numbers and
folders stay what they were. May touch: sweep.json, Slurm through slurm/state.py.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from launch.runs.local import running
from launch.runs.run_manifest import attempts, read_record
from launch.slurm.commands import SlurmUnavailable
from launch.slurm.reasons import WAITING
from launch.slurm.records import JobState, array_tasks
from launch.slurm.state import job_states
from launch.spec.grid import Point
from megatron_mone.common.documents import AnyText, Document, Part
from megatron_mone.common.exit_status import STOPPED

RECORD = "sweep.json"
_LABEL_LETTERS = 120  # a folder's name may have 255 bytes
FINISHED, RUNNING, QUEUED, MISSING = "finished", "running", "waiting", "missing"
FAILED, STOPPED_EARLY, UNKNOWN = "failed", "stopped", "unknown"


class SweepCase(Part):
    """One case; in the file its number is its place."""

    number: int = Field(default=0, exclude=True)
    """Its place in the sweep, and its index in the job array."""
    values: dict[AnyText, AnyText]
    """Argument -> value; empty for a run that is no sweep."""
    flags: list[AnyText]
    """The words that set them."""

    @property
    def label(self) -> str:
        """mone_neuron_ratio=0.5,seed=1"""
        return ",".join(f"{name}={value}" for name, value in self.values.items())

    @property
    def folder(self) -> str:
        """Its folder in the run folder."""
        if not self.values:
            return "."
        # The number keeps cases apart whose values differ in letters that a folder should not have.
        letters = re.sub(r"[^A-Za-z0-9._=,+-]", "_", self.label)[:_LABEL_LETTERS]
        return f"cases/{self.number:03d}-{letters}"


SINGLE = SweepCase(values={}, flags=[])
"""The one case of a run that is no sweep; its folder is the run's."""


class SweepRecord(
    Document, schema="megatron-mone/sweep/1", again="choose another --name", indent=1
):
    """sweep.json."""

    cases: list[SweepCase]
    """In the order of their numbers."""


@dataclass(frozen=True)
class CaseState:
    """How far a case is.

    Attributes:
        state: finished, running, waiting (in Slurm's queue), stopped (after a checkpoint), failed,
            missing (never begun) or unknown (Slurm does not answer).
        reason: why, where the state needs one.
    """

    state: str
    reason: str = ""

    def __str__(self) -> str:
        """failed with status 3; failed: cancelled; running."""
        if not self.reason or self.reason.startswith(self.state):
            return self.reason or self.state
        return f"{self.state}: {self.reason}"

    @property
    def active(self) -> bool:
        """It runs, or will without our doing."""
        return self.state in (RUNNING, QUEUED)


def read_cases(folder: Path) -> tuple[SweepCase, ...]:
    """The cases of a sweep in the order of their numbers; none where there is no sweep.

    Raises:
        ValueError: sweep.json cannot be read.
    """
    path = folder / RECORD
    if not path.exists():
        return ()
    cases = read_record(SweepRecord, path, "sweep").cases
    return tuple(case.model_copy(update={"number": n}) for n, case in enumerate(cases))


def write_cases(folder: Path, cases: Iterable[SweepCase]) -> None:
    """Write sweep.json."""
    SweepRecord(cases=list(cases)).write(folder / RECORD)


def grown(cases: Sequence[SweepCase], points: Iterable[Point]) -> tuple[SweepCase, ...]:
    """The cases with those of a grid that are not there yet, behind the others."""
    found = list(cases)
    for point in points:
        values = dict(point.values)
        if all(case.values != values for case in found):
            found.append(SweepCase(number=len(found), values=values, flags=list(point.flags)))
    return tuple(found)


def numbers_of(cases: Iterable[SweepCase], points: Iterable[Point]) -> list[int]:
    """The numbers of a grid's cases, which are all there."""
    asked = [dict(point.values) for point in points]
    return [case.number for case in cases if case.values in asked]


def case_states(
    folder: Path,
    cases: Sequence[SweepCase],
    starts: Sequence[Mapping[str, Any]],
    *,
    here: bool,
    sure: bool,
) -> list[CaseState]:
    """How far each case is.

    Args:
        folder: run folder.
        cases: of it.
        starts: of its manifest.
        here: a process holds the run (`runs_here`); the caller itself does not count.
        sure: do without Slurm only where it does not matter.

    Raises:
        SlurmUnavailable: `sure`, and Slurm does not answer on cases that it may still run.
        ValueError: a file of an attempt cannot be read.
    """
    tried = [attempts(folder / case.folder) for case in cases]
    done = [any(attempt["status"] == 0 for attempt in own) for own in tried]
    open_cases = {case.number for case, finished in zip(cases, done, strict=True) if not finished}
    tasks: dict[int, JobState] | None
    try:
        tasks = _tasks_of(starts, open_cases)
    except SlurmUnavailable:
        if sure:
            raise
        tasks = None
    submitted = {n for start in starts if "job_id" in start for n in start.get("cases", [0])}
    return [
        CaseState(FINISHED)
        if finished
        else CaseState(UNKNOWN, "Slurm does not answer")
        if tasks is None and case.number in submitted
        else _open_state(own, (tasks or {}).get(case.number), here)
        for case, own, finished in zip(cases, tried, done, strict=True)
    ]


def _open_state(own: Sequence[Mapping[str, Any]], task: JobState | None, here: bool) -> CaseState:
    """The state of a case that has not finished."""
    if task is not None and not task.finished:
        return CaseState(QUEUED if task.state in WAITING else RUNNING)
    if not own:
        return CaseState(MISSING)
    last = own[-1]
    if last["end"] is not None:
        stopped = last["status"] == STOPPED
        return CaseState(STOPPED_EARLY if stopped else FAILED, str(last["reason"]))
    if here and str(last["job_id"]).startswith("local-"):
        return CaseState(RUNNING)
    if task is not None:
        return CaseState(FAILED, f"{task.state.lower()} by Slurm")
    return CaseState(FAILED, "killed, or lost with its node")


def _tasks_of(starts: Sequence[Mapping[str, Any]], numbers: set[int]) -> dict[int, JobState]:
    """Case number -> the array task that runs it or will, else the last that Slurm knows."""
    wanted = {
        start["job_id"]: numbers & set(start.get("cases", [0]))
        for start in starts
        if "job_id" in start
    }
    found: dict[int, JobState] = {}
    for task in job_states([job for job, own in wanted.items() if own]):
        own = set(array_tasks(task.array_task)) if task.array_task else {0}
        for number in own & wanted[task.job_id]:
            if number not in found or found[number].finished:
                found[number] = task
    return found


def runs_here(folder: Path) -> bool:
    """Whether a process runs its ranks on this machine, or on one with the same file system."""
    try:
        with running(folder):
            return False
    except ValueError:
        return True
