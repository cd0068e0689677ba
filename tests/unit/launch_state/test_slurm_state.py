"""Slurm's answers, recorded from Slurm 22.05.8 or in the form of later releases, read as JobState.

The recorded jobs, on two nodes n0 and n1, n1 drained after the fifth: 1 `exit 3`, 2 `kill -9 $$`,
3 `true`, 4 an array 0-2%1 of 90 minutes, 5 requeued, 6 after 3, 8 after 1, 9 after 4, 10 in an hour
and for 2-01:00:00, 11 on three nodes, 12 held, 13 on n1, 14 on both nodes for 30 minutes.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import commands as slurm_commands
from launch.slurm import records as slurm_records
from launch.slurm.commands import SlurmUnavailable
from launch.slurm.reasons import why_waiting
from launch.slurm.records import JobState
from launch.slurm.state import job_states

RECORDED = Path(__file__).with_name("recorded")
BY_JSON = json.loads((RECORDED / "squeue-22.05.json").read_text())["jobs"]
BY_TEXT = (RECORDED / "scontrol-22.05.txt").read_text().splitlines()
SACCT = [
    dict(zip(slurm_commands.SACCT_FIELDS, line.split("\x1f"), strict=True))
    for line in (RECORDED / "sacct-22.05.txt").read_text().split("\n")
    if line
]
LABELS = {"1", "2", "3", "4_0", "4_[1-2%1]", "5", "6", "8", "9", "10", "11", "12", "13", "14"}


@pytest.fixture(params=["squeue --json", "scontrol"])
def jobs(request: pytest.FixtureRequest) -> dict[str, JobState]:
    if request.param == "scontrol":
        read = map(slurm_records.from_oneliner, BY_TEXT)
    else:
        read = map(slurm_records.from_json, BY_JSON)
    return {job.label: job for job in read}


def test_every_recorded_job_is_read(jobs: dict[str, JobState]) -> None:
    assert set(jobs) == LABELS


def test_states_and_how_they_ended(jobs: dict[str, JobState]) -> None:
    ended = {label: (j.state, j.exit_code, j.signal) for label, j in jobs.items() if j.finished}
    assert ended == {
        "1": ("FAILED", 3, 0),
        "2": ("FAILED", 0, 9),
        "3": ("COMPLETED", 0, 0),
        "6": ("COMPLETED", 0, 0),
    }
    assert jobs["4_0"].state == "RUNNING"
    assert {job.state for job in jobs.values() if not job.finished} == {"RUNNING", "PENDING"}


def test_times_and_limits(jobs: dict[str, JobState]) -> None:
    assert {job.end is not None for job in jobs.values() if job.finished} == {True}
    assert {job.end for job in jobs.values() if not job.finished} == {None}
    limits = {label: jobs[label].time_limit_minutes for label in ("4_0", "10", "14", "12")}
    assert limits == {"4_0": 90, "10": 2 * 1440 + 60, "14": 30, "12": None}
    assert jobs["12"].start is None
    assert jobs["10"].start is not None  # of the future, as asked


def test_names_nodes_restarts_and_output(jobs: dict[str, JobState]) -> None:
    assert (jobs["5"].name, jobs["5"].restarts, jobs["5"].nodes) == ("requeued name=x", 1, "")
    assert jobs["5"].stdout == "/srv/run/log/requeued name=x-5.out"
    assert (jobs["4_0"].job_id, jobs["4_0"].array_task, jobs["4_0"].nodes) == ("4", "0", "n0")
    assert jobs["4_0"].stdout == "/srv/run/log/array_4_00.out"
    assert jobs["4_[1-2%1]"].stdout == ""


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("4_[1-2%1]", "as many tasks of its array run as it allows"),
        ("5", "held back about two minutes"),
        ("8", "will never start"),
        ("9", "waits for another job: afterok:4_*(unfulfilled) [Dependency]"),
        ("10", "its start time has not come"),
        ("11", "more nodes than its partition allows"),
        ("12", "scontrol release"),
        ("13", "UnavailableNodes:n1 [ReqNodeNotAvail]"),
        ("14", "become free: Nodes required for job are DOWN, DRAINED or reserved"),
    ],
)
def test_why_each_recorded_job_waits(jobs: dict[str, JobState], label: str, says: str) -> None:
    said = why_waiting(jobs[label])
    assert said.startswith(f"{label} does not start: ")
    assert says in said
    assert "\n" not in said


def test_what_started_has_no_reason_to_wait(jobs: dict[str, JobState]) -> None:
    assert {why_waiting(jobs[label]) for label in ("1", "2", "3", "4_0", "6")} == {""}


def test_both_forms_say_the_same() -> None:
    by_json = {job.label: job for job in map(slurm_records.from_json, BY_JSON)}
    assert {job.label: job for job in map(slurm_records.from_oneliner, BY_TEXT)} == by_json


def later_form(record: dict[str, Any], exit_code: Any) -> dict[str, Any]:
    """The record as data_parser v0.0.40 (Slurm 23.11) writes it, by its OpenAPI description."""
    numbers = ("array_job_id", "array_task_id", "start_time", "end_time", "time_limit")
    new = dict(record, job_state=[record["job_state"]], exit_code=exit_code)
    for name in numbers:
        value = record[name]
        new[name] = {"set": value is not None, "infinite": False, "number": value or 0}
    return new


def two_fields(status: int, signal: int) -> dict[str, Any]:
    number = {"set": True, "infinite": False}
    return {
        "status": ["SIGNALED" if signal else "SUCCESS"],
        "return_code": number | {"number": status, "set": not signal},
        "signal": {"id": number | {"number": signal, "set": bool(signal)}, "name": ""},
    }


@pytest.mark.parametrize("form", ["23.02", "23.11"])
def test_later_json_reads_the_same(form: str) -> None:
    for record in BY_JSON:
        old = slurm_records.from_json(record)
        whole = {"set": True, "infinite": False, "number": record["exit_code"]}
        code = whole if form == "23.02" else two_fields(old.exit_code, old.signal)
        assert slurm_records.from_json(later_form(record, code)) == old


def test_later_json_says_infinite_and_flags_in_a_list() -> None:
    record = later_form(BY_JSON[3], two_fields(0, 0))
    record["time_limit"] = {"set": False, "infinite": True, "number": 0}
    record["job_state"] = ["CANCELLED", "COMPLETING"]
    state = slurm_records.from_json(record)
    assert (state.state, state.finished, state.time_limit_minutes) == ("COMPLETING", False, None)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("%x-%j.out", "/srv/run/array-7.out"),
        ("/log/%A_%a.out", "/log/4_0.out"),
        ("/log/%5A_%3a-%N-%u%%.out", "/log/00004_000-n0-root%.out"),
        ("/log/%t", "/log/%t"),
        ("", "/srv/run/slurm-4_0.out"),
    ],
)
def test_output_patterns(pattern: str, path: str) -> None:
    record = dict(BY_JSON[3], standard_output=pattern)
    assert slurm_records.from_json(record).stdout == path


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Slurm's answers, which a test changes: records, rows of sacct, rows of completed jobs."""
    answers: dict[str, Any] = {"queue": BY_JSON, "accounting": None, "completions": []}
    for name in ("queue", "accounting", "completions"):

        def answer(job_ids: list[str], name: str = name) -> Any:
            if isinstance(answers[name], Exception):
                raise answers[name]
            return answers[name]

        monkeypatch.setattr(slurm_commands, name, answer)
    return answers


def test_only_the_jobs_asked_for_in_their_order(slurm: dict[str, Any]) -> None:
    assert [job.label for job in job_states(["12", "4", "2"])] == ["12", "4_0", "4_[1-2%1]", "2"]
    assert [job.label for job in job_states(["4_0", "4_2"])] == ["4_0", "4_[1-2%1]"]
    assert [job.label for job in job_states(["4_3", "7", "1_0"])] == []
    assert job_states([]) == []


@pytest.mark.parametrize(
    ("listed", "numbers"),
    [("3", {3}), ("0-2%1", {0, 1, 2}), ("1,4-5,10-20:5%4", {1, 4, 5, 10, 15, 20}), ("", set())],
)
def test_lists_of_array_tasks(listed: str, numbers: set[int]) -> None:
    assert set(slurm_records.array_tasks(listed)) == numbers


def test_accounting_knows_what_the_queue_forgot(slurm: dict[str, Any]) -> None:
    """Recorded with slurmdbd: 1 an array whose tasks exit 0 and 1, 2 requeued twice, 3 cancelled
    by its user, 6 killed by signal 9."""
    slurm |= {"queue": [], "accounting": SACCT}
    found = {job.label: job for job in job_states(["1", "2", "3", "6"])}
    assert {label: job.state for label, job in found.items()} == {
        "1_0": "COMPLETED",
        "1_1": "FAILED",
        "2": "RUNNING",
        "3": "CANCELLED",
        "6": "FAILED",
    }
    assert (found["2"].restarts, found["1_0"].restarts) == (2, 0)
    assert (found["1_1"].exit_code, found["6"].signal) == (1, 9)
    assert found["1_0"].name == "a b|c"
    assert found["1_0"].time_limit_minutes == 90
    assert (found["2"].end, found["2"].reason) == (None, "")


def test_ended_tasks_join_those_still_in_the_queue(slurm: dict[str, Any]) -> None:
    rows = [dict(SACCT[3], JobID=f"4_{task}", State=state) for task, state in
            [("7", "TIMEOUT"), ("0", "PENDING"), ("1", "PENDING")]]  # fmt: skip
    slurm["accounting"] = rows
    assert {job.label: job.state for job in job_states(["4"])} == {
        "4_0": "RUNNING",
        "4_[1-2%1]": "PENDING",
        "4_7": "TIMEOUT",
    }


def test_accounting_that_is_down_matters_only_where_it_is_needed(slurm: dict[str, Any]) -> None:
    slurm["accounting"] = SlurmUnavailable("sacct: down")
    assert len(job_states(["4"])) == 2
    with pytest.raises(SlurmUnavailable, match="sacct: down"):
        job_states(["4", "77"])


def test_accounting_may_lag_or_lead_the_queue(slurm: dict[str, Any]) -> None:
    slurm |= {"queue": [], "accounting": [dict(SACCT[3], JobID="4_7", State="RUNNING")]}
    assert [job.label for job in job_states(["4_7"])] == ["4_7"]


def test_completed_jobs_whose_row_sacct_took_apart_are_left_out(slurm: dict[str, Any]) -> None:
    row = dict.fromkeys(slurm_commands.COMPLETION_FIELDS, "") | {"JobID": "70", "ExitCode": "2:0"}
    times = {"Start": "1000", "End": "2000", "Timelimit": "UNLIMITED", "NodeList": "n0"}
    slurm |= {"queue": [], "completions": [row | times, row | times | {"State": "FAILED"}]}
    (state,) = job_states(["70"])
    assert (state.state, state.exit_code, state.start, state.end) == ("FAILED", 2, 1000, 2000)
    assert state.time_limit_minutes is None


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("QOSMaxJobsPerUserLimit", "its QOS limits jobs running per user"),
        ("QOSMaxGRESPerUser", "its QOS limits GPUs per user"),
        ("QOSMaxNodePerJobLimit", "its QOS limits nodes per job"),
        ("QOSMaxWallDurationPerJobLimit", "limits time per job"),
        ("QOSGrpNodeLimit", "its QOS limits nodes of all jobs together"),
        ("QOSMinGRES", "its QOS asks for more GPUs than this job does"),
        ("AssocGrpGRESMinutes", "its account limits GPUs x minutes of all"),
        ("AssocGrpCPUMinutesLimit", "limits CPUs x minutes of all jobs together"),
        ("AssocMaxJobsLimit", "its account limits jobs running"),
        ("QOSMaxSubmitJobPerUserLimit", "limits jobs submitted per user"),
        ("Priority", "jobs of higher priority are ahead of it"),
        ("SomethingNew", "Slurm's reason is [SomethingNew]"),
        ("", "not looked at it yet"),
    ],
)
def test_reasons_in_plain_words(reason: str, says: str) -> None:
    record = dict(BY_JSON[-1], state_reason=reason or "None", state_description="")
    said = why_waiting(slurm_records.from_json(record))
    assert says in said
    assert said.endswith(f"[{reason or 'None'}]")


def test_a_job_that_slurm_failed_before_its_start_says_why() -> None:
    changes = {"job_state": "FAILED", "state_reason": "BadConstraints", "start_time": 1000}
    state = slurm_records.from_json(dict(BY_JSON[-1], **changes))
    assert state.start is None
    assert "no nodes of this cluster can ever satisfy it" in why_waiting(state)
    cancelled = slurm_records.from_json(dict(BY_JSON[-1], job_state="CANCELLED"))
    assert why_waiting(cancelled) == ""


def test_a_text_of_another_form_is_an_error_not_a_guess() -> None:
    with pytest.raises(SlurmUnavailable, match="form not known"):
        slurm_records.from_oneliner("JobId=1 JobState=RUNNING")
