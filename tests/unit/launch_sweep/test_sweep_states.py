"""What a case of a sweep is, and how far: the record, the attempts on disk, Slurm's answers."""

import json
from typing import Any

import pytest

from launch.runs import sweep_cases
from launch.runs.local import running
from launch.runs.run_manifest import begin_attempt, end_attempt
from launch.runs.sweep_cases import (
    SINGLE,
    case_states,
    grown,
    numbers_of,
    read_cases,
    runs_here,
    write_cases,
)
from launch.slurm.commands import SlurmUnavailable
from launch.slurm.records import JobState
from launch.spec.grid import Point


def point(**values: str) -> Point:
    flags = [word for name, value in values.items() for word in (f"--{name}", value)]
    return Point(tuple(values.items()), tuple(flags))


def task(job: str, element: str, state: str) -> JobState:
    """A task of an array as Slurm knows it."""
    facts: dict[str, Any] = dict.fromkeys(JobState.__dataclass_fields__)
    return JobState(**{**facts, "job_id": job, "array_task": element, "state": state})


@pytest.fixture
def slurm(monkeypatch) -> list[JobState]:
    """Slurm's tasks; what the test puts into the list it knows."""
    known: list[JobState] = []

    def job_states(jobs):
        return [state for state in known if state.job_id in jobs]

    monkeypatch.setattr(sweep_cases, "job_states", job_states)
    return known


CASES = grown((), [point(r=value) for value in ("1", "0.5", "0.25")])


def _states(folder, starts=(), here=False, sure=False) -> list[str]:
    return [str(state) for state in case_states(folder, CASES, starts, here=here, sure=sure)]


def _attempt(folder, number: int, job: str, end: tuple[int, str] | None = None) -> None:
    case = folder / CASES[number].folder
    begin_attempt(case, job, f"{job}.0", "n0")
    if end is not None:
        end_attempt(case, f"{job}.0", *end)


def test_a_sweep_grows_behind_and_keeps_its_numbers(tmp_path):
    write_cases(tmp_path, CASES)
    more = grown(read_cases(tmp_path), [point(r="0.125"), point(r="0.5"), point(r="2")])
    assert more[:3] == read_cases(tmp_path) == CASES
    assert [case.values["r"] for case in more[3:]] == ["0.125", "2"]
    assert [case.number for case in more] == [0, 1, 2, 3, 4]
    assert numbers_of(more, [point(r="2"), point(r="0.5")]) == [1, 4]


def test_a_case_is_its_values_in_any_order():
    both = grown((), [point(a="1", b="2")])
    assert grown(both, [point(b="2", a="1")]) == both
    assert len(grown(both, [point(a="1")])) == 2


def test_a_folder_has_the_number_and_safe_letters():
    (case,) = grown((), [point(a="../$(x) y", b="0.5")])
    assert case.folder == "cases/000-a=..___x__y,b=0.5"
    (long,) = grown((), [point(a="x" * 400)])
    assert len(long.folder.partition("/")[2].encode()) < 200
    assert SINGLE.folder == "."


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": "other", "cases": []}', '{"schema": "megatron-mone/sweep/1"}',
             '{"schema": "megatron-mone/sweep/1", "cases": [{"values": 3, "flags": []}]}'],
)  # fmt: skip
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.json is not a sweep of schema") as refusal:
        read_cases(tmp_path)
    assert "\n" not in str(refusal.value)


def test_states_without_slurm_come_from_the_attempts(tmp_path, slurm):
    _attempt(tmp_path, 0, "local-1-2", (3, "failed with status 3"))
    _attempt(tmp_path, 0, "local-5-6", (0, "finished"))
    _attempt(tmp_path, 1, "local-7-8", (3, "failed with status 3"))
    assert _states(tmp_path) == ["finished", "failed with status 3", "missing"]


@pytest.mark.parametrize(
    ("end", "shown"),
    [
        ((75, "stopped after a checkpoint"), "stopped after a checkpoint"),
        ((75, "not requeued: it was 20 times"), "stopped: not requeued: it was 20 times"),
        ((130, "interrupted"), "failed: interrupted"),
        (None, "failed: killed, or lost with its node"),
    ],
)
def test_how_a_case_ended(tmp_path, slurm, end, shown):
    _attempt(tmp_path, 2, "local-1-2", end)
    assert _states(tmp_path)[2] == shown


def test_an_attempt_without_an_end_runs_while_its_process_holds_the_run(tmp_path, slurm):
    _attempt(tmp_path, 0, "local-1-2")
    _attempt(tmp_path, 1, "7_1")
    assert not runs_here(tmp_path)
    with running(tmp_path):
        here = runs_here(tmp_path)
        assert here
    assert _states(tmp_path, here=here)[:2] == ["running", "failed: killed, or lost with its node"]


def test_slurm_says_what_runs_and_waits(tmp_path, slurm):
    slurm += [task("7", "0", "RUNNING"), task("7", "1-2%1", "PENDING")]
    _attempt(tmp_path, 0, "7_0")
    starts = [{"job_id": "7", "cases": [0, 1, 2]}]
    assert _states(tmp_path, starts) == ["running", "waiting", "waiting"]


def test_elements_of_the_array_are_not_cases_that_were_not_submitted(tmp_path, slurm):
    slurm.append(task("7", "0,2", "PENDING"))
    assert _states(tmp_path, [{"job_id": "7", "cases": [0, 2]}]) == [
        "waiting",
        "missing",
        "waiting",
    ]


def test_a_requeued_case_waits_though_its_attempt_ended(tmp_path, slurm):
    slurm.append(task("7", "1", "PENDING"))
    _attempt(tmp_path, 1, "7_1", (75, "requeued after a checkpoint"))
    assert _states(tmp_path, [{"job_id": "7", "cases": [1]}])[1] == "waiting"


def test_a_later_job_of_a_case_counts_over_an_ended_one(tmp_path, slurm):
    slurm += [task("9", "1", "RUNNING"), task("7", "1", "FAILED")]
    starts = [{"job_id": "7", "cases": [1]}, {"job_id": "9", "cases": [1]}]
    _attempt(tmp_path, 1, "7_1", (1, "failed with status 1"))
    assert _states(tmp_path, starts)[1] == "running"
    slurm.reverse()
    assert _states(tmp_path, starts)[1] == "running"


def test_what_slurm_ended_says_so(tmp_path, slurm):
    slurm += [task("7", "0", "CANCELLED"), task("7", "1", "CANCELLED")]
    _attempt(tmp_path, 0, "7_0")
    starts = [{"job_id": "7", "cases": [0, 1]}]
    assert _states(tmp_path, starts) == ["failed: cancelled by Slurm", "missing", "missing"]


def test_a_silent_slurm_is_unknown_in_a_table_and_an_error_when_deciding(tmp_path, monkeypatch):
    def job_states(jobs):
        if jobs:
            raise SlurmUnavailable("slurmctld is down")
        return []

    monkeypatch.setattr(sweep_cases, "job_states", job_states)
    starts = [{"job_id": "7", "cases": [0, 1]}]
    _attempt(tmp_path, 0, "7_0", (0, "finished"))
    assert _states(tmp_path, starts) == ["finished", "unknown: Slurm does not answer", "missing"]
    with pytest.raises(SlurmUnavailable):
        _states(tmp_path, starts, sure=True)
    _attempt(tmp_path, 1, "7_1", (0, "finished"))
    # Nothing that Slurm may still run: it is not asked.
    assert _states(tmp_path, starts, sure=True) == ["finished", "finished", "missing"]


def test_the_record_holds_values_and_flags(tmp_path):
    write_cases(tmp_path, CASES[:1])
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["cases"] == [{"values": {"r": "1"}, "flags": ["--r", "1"]}]
