"""What of a sweep is missing, and submitting just that.

A case is missing until an attempt at it has ended with status 0 or one is under way; one that
failed or was stopped goes on from its checkpoint. May touch: the run folder, Slurm through
slurm_commands.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.runs.local import running
from launch.runs.run_manifest import MANIFEST, gather, locked
from launch.runs.submission import SUBMIT_LOCK, noted, recover
from launch.runs.sweep_cases import FINISHED, RECORD, CaseState, SweepCase, case_states, read_cases


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do.

    Attributes:
        cases: all of the sweep, also those of earlier grids.
        states: of the cases of this grid, by number.
        missing: numbers of those to run, rising.
    """

    cases: tuple[SweepCase, ...]
    states: Mapping[int, CaseState]
    missing: tuple[int, ...]

    def summary(self, doing: str) -> str:
        """3 of 4 cases are finished, 1 is submitted: job 17.

        Args:
            doing: what is done with the missing, after "is" or "are".
        """
        known = Counter(state.state for state in self.states.values())
        parts = [f"{known[FINISHED]} of {_count(len(self.states), 'case')} finished"]
        active = {state.state for state in self.states.values() if state.active}
        parts += [f"{_are(known[state])} {state}" for state in sorted(active)]
        parts += [f"{_are(len(self.missing))} {doing}"] if self.missing else ["none is missing"]
        return ", ".join(parts)


def resume_sweep(folder: Path, script: Path, job: str | None) -> str | None:
    """Submit what is missing of a sweep's script; returns the new job's id, or None: nothing is.

    Args:
        folder: of the sweep.
        script: as it was submitted last.
        job: an element such as 42_1, to submit that case alone; else all.

    Raises:
        ValueError: nothing of it was ever submitted, or Slurm refuses.
        SlurmUnavailable: Slurm does not answer.
    """
    with locked(folder / SUBMIT_LOCK), running(folder):
        recover(folder)
        manifest = gather(folder)
        submitted = [start for start in manifest.starts if "job_id" in start]
        if not submitted:
            raise ValueError(f"{folder.name} was never submitted: start it again as it was started")
        # Cases that were only ever run here are not in the script.
        numbers = sorted({number for start in submitted for number in start["cases"]})
        _, _, element = (job or "").partition("_")
        if element:
            numbers = [number for number in numbers if str(number) == element]
            if not numbers:
                raise ValueError(f"{job} is no case of {folder.name}: leave out {'_' + element!r}")
        todo = plan_of(folder, read_cases(folder), numbers)
        if not todo.missing:
            return None
        start = {"ranks": submitted[-1]["ranks"], "cases": list(todo.missing)}
        with noted(folder, start) as send:
            return send(script, elements(todo.missing))


def elements(numbers: Sequence[int]) -> list[str]:
    """The options of sbatch that submit some elements of a script's job array."""
    return [f"--array={','.join(map(str, numbers))}"]


def is_sweep(folder: Path) -> bool:
    """Whether a run folder holds a sweep."""
    return (folder / RECORD).exists()


def plan_of(folder: Path, cases: tuple[SweepCase, ...], numbers: Sequence[int]) -> Plan:
    """What is missing; the caller holds the locks of the folder, so that nothing is run here.

    Args:
        folder: of the sweep.
        cases: all of it.
        numbers: of those that are asked for.

    Raises:
        ValueError: a record in the folder cannot be read.
        SlurmUnavailable: Slurm does not answer on a case that it may still run.
    """
    starts = gather(folder).starts if (folder / MANIFEST).exists() else []
    asked = [cases[number] for number in numbers]
    found = case_states(folder, asked, starts, here=False, sure=True)
    states = dict(zip(numbers, found, strict=True))
    missing = [n for n, state in states.items() if state.state != FINISHED and not state.active]
    return Plan(cases, states, tuple(missing))


def _count(number: int, noun: str) -> str:
    """1 case is; 2 cases are."""
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"


def _are(number: int) -> str:
    return f"{number} is" if number == 1 else f"{number} are"
