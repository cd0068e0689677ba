"""status, logs, cancel and resume, with Slurm's answers given by the test."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.runs import run_commands, submission
from launch.runs import run_manifest as manifest
from launch.runs.local import running
from launch.slurm.commands import SlurmUnavailable
from launch.slurm.records import JobState


@dataclass
class Slurm:
    """What Slurm says of a job, and what it was asked to do."""

    state: str = "RUNNING"
    reason: str = ""
    silent: bool = False

    def __post_init__(self) -> None:
        self.asked: list[str] = []

    def job_states(self, job_ids: list[str]) -> list[JobState]:
        if self.silent:
            raise SlurmUnavailable("slurmctld is down")
        facts = {name: None for name in JobState.__dataclass_fields__}
        facts |= {"job_id": job_ids[0], "array_task": "", "state": self.state, "detail": ""}
        return [JobState(**{**facts, "reason": self.reason, "nodes": ""})]

    def cancel(self, job_id: str) -> None:
        self.asked.append(f"cancel {job_id}")

    def submit(self, script: Path, options: Sequence[str] = ()) -> str:
        self.asked.append(f"submit {script}")
        return "50"


@pytest.fixture
def slurm(monkeypatch) -> Slurm:
    slurm = Slurm()
    for name in ("job_states", "cancel"):
        monkeypatch.setattr(run_commands, name, getattr(slurm, name))
    monkeypatch.setattr(submission, "submit", slurm.submit)
    return slurm


@pytest.fixture
def runs(tmp_path) -> Path:
    """A run that was submitted as job 42 and requeued once, and one that ran here."""
    folder = tmp_path / "alpha"
    manifest.record_start(folder, "alpha", {"a": 1}, (), {"job_id": "42", "ranks": 2})
    manifest.begin_attempt(folder, "42", "42.0", "n0")
    manifest.end_attempt(folder, "42.0", 75, "requeued after a checkpoint")
    manifest.begin_attempt(folder, "42", "42.1", "n1")
    (folder / "job.sbatch").write_text("#!/bin/bash\n")
    manifest.record_start(tmp_path / "beta", "beta", {"b": 1}, (), {"ranks": 1})
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _main(runs: Path, *words: str) -> int:
    return main([words[0], "--runs", str(runs), *words[1:]])


def test_status_says_what_a_run_does_and_how_it_came_there(runs, slurm, capsys):
    assert _main(runs, "status") == 0
    assert capsys.readouterr().out.splitlines() == [
        "alpha: job 42 RUNNING; 2 attempts, the last to end: requeued after a checkpoint",
        "beta: not running here; 0 attempts",
    ]


def test_status_says_why_a_job_waits(runs, slurm, capsys):
    slurm.state, slurm.reason = "PENDING", "Priority"
    assert _main(runs, "status", "42") == 0
    first, why = capsys.readouterr().out.splitlines()
    assert first.startswith("alpha: job 42 PENDING")
    assert "does not start" in why
    assert "[Priority]" in why


def test_status_without_slurm_says_what_the_files_say(runs, slurm, capsys):
    slurm.silent = True
    assert _main(runs, "status", "alpha") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "state unknown; 2 attempts" in line
    assert "slurmctld is down" in line


def test_status_sees_a_run_of_another_process(runs, slurm, capsys):
    with running(runs / "beta"):
        assert _main(runs, "status", "beta") == 0
    assert capsys.readouterr().out == "beta: running here; 0 attempts\n"


def test_status_writes_the_attempts_into_the_manifest(runs, slurm):
    _main(runs, "status")
    written = json.loads((runs / "alpha/manifest.json").read_text())
    assert [attempt["attempt"] for attempt in written["attempts"]] == ["42.0", "42.1"]


def test_logs_are_the_job_s_and_the_last_attempt_s(runs, slurm, capfd):
    logs = runs / "alpha/logs"
    _write(logs / "42.log", "batch\n")
    for attempt in ("42.0", "42.1"):
        for rank in range(3):
            _write(logs / attempt / f"rank-{rank:05d}.log", f"{attempt} rank {rank}\n")
    assert _main(runs, "logs", "alpha") == 0
    out = capfd.readouterr().out
    for text in ("batch\n", "42.1 rank 0\n", "42.1 rank 2\n"):
        assert text in out
    assert "42.0" not in out.replace("42.0.", "")
    assert "rank 1\n" not in out


def test_logs_of_one_element_of_an_array(runs, slurm, capfd):
    folder = runs / "alpha"
    for element in "01":
        _write(folder / f"logs/42_{element}.log", f"batch {element}\n")
        case = folder / f"cases/00{element}-x"
        manifest.begin_attempt(case, f"42_{element}", f"42_{element}.0", "n0")
        _write(case / f"logs/42_{element}.0/rank-00000.log", f"rank of {element}\n")
    assert _main(runs, "logs", "42_0") == 0
    out = capfd.readouterr().out
    assert "batch 0\n" in out
    assert "rank of 0\n" in out
    assert "of 1\n" not in out


def test_logs_can_be_followed(runs, slurm):
    log = runs / "alpha/logs/42.log"
    _write(log, "first\n")
    command = [sys.executable, "-m", "launch", "logs", "-f", "42", "--runs", str(runs)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as follower:
        assert follower.stdout is not None
        try:
            assert follower.stdout.readline() == "first\n"
            with log.open("a") as stream:
                stream.write("second\n")
            assert follower.stdout.readline() == "second\n"
        finally:
            os.killpg(follower.pid, signal.SIGTERM)


def test_cancel_takes_a_name_or_a_job(runs, slurm, capsys):
    assert _main(runs, "cancel", "alpha") == 0
    assert _main(runs, "cancel", "42_3") == 0
    assert slurm.asked == ["cancel 42", "cancel 42_3"]
    assert capsys.readouterr().out.startswith("job 42 is cancelled\n")


def test_resume_submits_the_script_again_and_records_it(runs, slurm, capsys):
    slurm.state = "TIMEOUT"
    assert _main(runs, "resume", "alpha") == 0
    assert slurm.asked == [f"submit {runs}/alpha/job.sbatch"]
    starts = json.loads((runs / "alpha/manifest.json").read_text())["starts"]
    assert [(start["job_id"], start["ranks"]) for start in starts] == [("42", 2), ("50", 2)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["resume", "alpha"], "job 42 of alpha is RUNNING"),
        (["resume", "beta"], "beta was never submitted"),
        (["cancel", "beta"], "beta is no job of Slurm"),
        (["cancel", "alpah"], "did you mean 'alpha'?"),
        (["cancel"], "cancel takes one run"),
        (["logs", "alpha"], "nothing was written"),
        (["logs", "--folow"], "did you mean '--follow'?"),
    ],
)
def test_a_mistake_is_one_line(runs, slurm, capsys, words, said):
    try:
        status = _main(runs, *words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert slurm.asked == []
