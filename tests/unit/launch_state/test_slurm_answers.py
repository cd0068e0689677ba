"""Slurm's answers that are not as expected: another way is asked, or one line says what was said.

Whatever the programs print, a job is read as it is or not at all, and nobody sees a traceback.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.__main__ import main
from launch.runs.run_manifest import record_start
from launch.slurm import answers as slurm_answers
from launch.slurm import commands as slurm_commands
from launch.slurm import records as slurm_records
from launch.slurm import state as slurm_state
from launch.slurm.commands import SlurmUnavailable
from launch.slurm.records import JobState
from launch.slurm.state import job_states, unfinished_jobs_in
from tests.unit.launch_state.test_slurm_state import BY_JSON, BY_TEXT, SACCT, later_form, two_fields

JSON = json.dumps({"jobs": BY_JSON})
TEXT = "\n".join(BY_TEXT)
BANNER = "*** Welcome to {the cluster} ***\nMaintenance on Monday\n\n"


class Programs:
    """Stand-ins for Slurm's programs: what they print, and their status."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("squeue", "scontrol", "sacct", "sbatch", "scancel"):
            (folder / name).write_text(
                '#!/bin/bash\ncat "$0.out"; cat "$0.err" >&2; exit $(<"$0.rc")\n'
            )
            (folder / name).chmod(0o755)
            self.say(name, status=1, err=f"{name}: error: not asked for\n")

    def say(self, name: str, out: str | bytes = "", err: str = "", status: int = 0) -> None:
        data = out if isinstance(out, bytes) else out.encode()
        (self.folder / f"{name}.out").write_bytes(data)
        (self.folder / f"{name}.err").write_text(err)
        (self.folder / f"{name}.rc").write_text(str(status))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    programs = Programs(tmp_path / "bin")
    programs.say("sacct", err="Slurm accounting storage is disabled\n", status=1)
    return programs


GARBLED = {
    "nothing": "",
    "a banner": BANNER,
    "half": JSON[: len(JSON) // 2],
    "all but the end": JSON[:-1],
    "no jobs": '{"meta": {}}',
    "jobs of another form": '{"jobs": {"1": {}}}',
    "jobs that are none": '{"jobs": [1]}',
    "a list": "[]",
    "a word": "null",
    "not UTF-8": b"\xff\xfe\x00{",
    "a table": "JOBID PARTITION NAME\n1 main x\n",
    "a deep nest": '{"jobs": ' + "[" * 100_000,
}


@pytest.mark.parametrize("kind", GARBLED)
def test_where_squeue_prints_something_else_scontrol_is_asked(slurm, kind):
    slurm.say("squeue", GARBLED[kind])
    slurm.say("scontrol", TEXT)
    assert [job.label for job in job_states(["3"])] == ["3"]
    waiting = unfinished_jobs_in(Path("/srv/run/log"))
    assert waiting == ["4", "5", "8", "9", "10", "11", "12", "13", "14"]


@pytest.mark.parametrize("kind", GARBLED)
def test_where_both_do_a_line_says_which_and_what_and_75_is_the_status(
    slurm, kind, tmp_path, capsys
):
    """Also a run that is known keeps what is known of it."""
    record_start(tmp_path / "runs/x", "x", {"command": ["true"]}, (), {"ranks": 1, "job_id": "3"})
    (tmp_path / "runs/x/job.sbatch").touch()
    slurm.say("squeue", GARBLED[kind])
    slurm.say("scontrol", GARBLED[kind])
    for action in ("cancel", "resume"):
        assert main([action, "--runs", str(tmp_path / "runs"), "x"]) == 75
        said = capsys.readouterr().err
        assert said.startswith("megatron-mone: error: squeue: printed ")
        assert "; scontrol: printed " in said
        assert said.count("\n") == 1
    assert main(["status", "--runs", str(tmp_path / "runs")]) == 0
    assert "x: job 3, state unknown; 0 attempts; squeue: printed" in capsys.readouterr().out


def test_where_scontrol_is_not_there_the_line_is_of_squeue(slurm, tmp_path, monkeypatch):
    slurm.say("squeue", BANNER)
    (tmp_path / "bin/scontrol").unlink()
    for tool in ("bash", "cat"):
        (tmp_path / "bin" / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    with pytest.raises(
        SlurmUnavailable, match=r"^squeue: printed '\*\*\* Wel.*; scontrol: not found"
    ):
        job_states(["3"])


@pytest.mark.parametrize("before", [BANNER, "\n", "{not json}\n", "\ufeff\n"])
def test_a_banner_around_an_answer_is_passed_over(slurm, before):
    slurm.say("squeue", before + JSON + "\nBye\n", err="squeue: warning: deprecated\n")
    assert {job.label for job in job_states(["4"])} == {"4_0", "4_[1-2%1]"}
    slurm.say("squeue", status=1, err="squeue: unrecognized option '--json'\n")
    slurm.say("scontrol", before + TEXT + "\n", err="scontrol: warning: deprecated\n")
    assert {job.label for job in job_states(["4"])} >= {"4_0", "4_[1-2%1]"}


def test_a_failure_of_squeue_that_is_no_refusal_asks_scontrol(slurm):
    slurm.say("squeue", err="squeue: error: symbol lookup error\n", status=127)
    slurm.say("scontrol", TEXT)
    assert [job.label for job in job_states(["2"])] == ["2"]
    slurm.say("scontrol", err="scontrol: error: symbol lookup error\n", status=127)
    with pytest.raises(
        SlurmUnavailable, match=r"^squeue: symbol .*; scontrol: symbol lookup error"
    ):
        job_states(["2"])


@pytest.mark.parametrize("errors", [["gone"], [{"code": 3}], {"error": "gone"}, "gone"])
def test_errors_of_any_form_are_no_empty_queue(slurm, errors):
    slurm.say("squeue", json.dumps({"jobs": [], "errors": errors}))
    with pytest.raises(SlurmUnavailable, match=r"^squeue: "):
        job_states(["3"])


@pytest.mark.parametrize("field", sorted(BY_JSON[2]))
def test_a_record_that_lacks_a_field_is_read_elsewhere_or_not_at_all(slurm, field):
    """Job 3 alone: what is wrong in another job's record does not matter."""
    records = [dict(record) for record in BY_JSON]
    del records[2][field]
    slurm.say("squeue", json.dumps({"jobs": records}))
    slurm.say("scontrol", BY_TEXT[2])
    (whole,) = [slurm_records.from_json(BY_JSON[2])]
    assert job_states(["3"]) == [whole]
    slurm.say("scontrol", err="scontrol: error: Unable to contact slurm controller\n", status=1)
    if field != "job_id":  # else it may be any
        assert [job.label for job in job_states(["2"])] == ["2"]


def test_sacct_that_prints_something_else(slurm):
    slurm.say("squeue", '{"jobs": []}')
    row = "\x1f".join(SACCT[1].values())
    slurm.say("sacct", f"{BANNER}{row}\n")
    assert [job.label for job in job_states(["3"])] == ["3"]
    slurm.say("sacct", f"{row[: len(row) // 2]}\n")
    with pytest.raises(SlurmUnavailable, match=r"^sacct: printed '3.*columns where 10 were asked"):
        job_states(["3"])
    slurm.say("sacct", "\x1f" * 9)
    with pytest.raises(SlurmUnavailable, match=r"^sacct: a record of a form not known"):
        job_states(["3"])


@pytest.mark.parametrize(
    "said",
    ["123\n", "123;big\n", f"{BANNER}123\n", "Submitted batch job 123\n", "123", "note\n123\nbye\n",
     "Submitted batch job 123 on cluster big\n"],
)  # fmt: skip
def test_the_number_in_sbatch_s_answer(slurm, said):
    slurm.say("sbatch", said)
    assert slurm_commands.submit(Path("x")) == "123"


@pytest.mark.parametrize("said", ["", BANNER, "job 123 submitted", "12a", "-3", "٣", b"\xff\xfe"])
def test_an_answer_without_a_number_loses_no_job(slurm, said, tmp_path, capsys):
    """The mark stays: the next command asks Slurm, which may have the job, and finds it."""
    (tmp_path / "site.yaml").write_text("tasks_per_node: 1\n")
    words = ["submit", "--runs", str(tmp_path), "--launch", str(tmp_path / "site.yaml")]
    words += ["--name", "x", "--", "true"]
    slurm.say("sbatch", said)
    assert main(words) == 75
    line = capsys.readouterr().err
    assert line.startswith("megatron-mone: error: sbatch: printed ")
    assert line.count("\n") == 1
    record = dict(BY_JSON[-1], job_id=77, standard_output=f"{tmp_path}/x/logs/%j.log")
    slurm.say("squeue", json.dumps({"jobs": [record]}))
    assert main(words) == 2
    assert "job 77 of x is in the queue" in capsys.readouterr().err


def test_a_program_that_is_none_is_no_mistake_of_the_user(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    (tmp_path / "bin/scancel").write_bytes(b"\x7fELF no program")
    with pytest.raises(SlurmUnavailable, match="scancel: cannot be started"):
        slurm_commands.cancel("3")


NUMBERS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3),
    st.fixed_dictionaries(
        {}, optional={"set": st.booleans(), "infinite": st.booleans(), "number": st.integers()}
    ),
    st.lists(st.sampled_from(["RUNNING", "COMPLETING", "PENDING", "x"]), max_size=2),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(range(len(BY_JSON))), st.booleans(),
    st.dictionaries(st.sampled_from(sorted(BY_JSON[0])), NUMBERS, max_size=3),
    st.sets(st.sampled_from(sorted(BY_JSON[0])), max_size=1),
)  # fmt: skip
def test_any_record_of_squeue_is_a_job_or_a_line(number, later, changes, absent):
    record = dict(BY_JSON[number])
    record = later_form(record, two_fields(0, 0)) if later else record
    record = {k: v for k, v in {**record, **changes}.items() if k not in absent}
    _is_job_or_line(slurm_records.from_json, record)
    _is_job_or_line(slurm_records.output_in_json, record)
    slurm_records.ids_in_json(record)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(BY_TEXT), st.integers(0, 2000), st.integers(0, 60), st.text(max_size=4))
def test_any_text_of_scontrol_is_a_job_or_a_line(text, start, length, put):
    broken = text[:start] + put + text[start + length :]
    _is_job_or_line(slurm_records.from_oneliner, broken)
    _is_job_or_line(slurm_records.output_in_oneliner, broken)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(SACCT),
    st.dictionaries(st.sampled_from(slurm_commands.SACCT_FIELDS), st.text(max_size=6), max_size=4),
)
def test_any_row_of_sacct_is_a_job_or_a_line(row, changes):
    _is_job_or_line(slurm_records.from_sacct, {**row, **changes})


@settings(deadline=None, max_examples=100)
@given(st.integers(0, len(JSON)), st.integers(0, 40), st.text(max_size=4))
def test_any_answer_of_squeue_is_jobs_or_none(start, length, put):
    answer = slurm_answers.json_answer(JSON[:start] + put + JSON[start + length :])
    assert answer is None or {"jobs", "errors"} == answer.keys()


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_words_of_sbatch_are_a_number_or_none(said):
    number = slurm_answers.submitted_id(said)
    assert number is None or slurm_commands.checked_id(number) == number


def _is_job_or_line(read: Any, record: Any) -> None:
    said, job = "", None
    try:
        job = read(record)
    except SlurmUnavailable as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    assert "a record of a form not known" in said or isinstance(job, JobState | str)
    if isinstance(job, JobState):
        assert job.job_id
        assert job.state
        assert slurm_state._asked(job, job.job_id)
