"""What is left of a submission whose launcher dies, hangs or is refused, and who finds it."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from launch.runs import run_manifest as manifest
from launch.runs import submission
from launch.runs.run_manifest import locked
from launch.runs.submission import MARK, SUBMIT_LOCK, noted, recover, recover_if_free
from launch.slurm import commands as slurm_commands
from launch.slurm.commands import SlurmAbsent, SlurmRefused, SlurmUnavailable
from launch.slurm.state import unfinished_jobs_in

Queue = list[dict[str, Any]]
RECORDED = Path(__file__).parents[1] / "launch_state" / "recorded"
WAITS = next(
    job for job in json.loads((RECORDED / "squeue-22.05.json").read_text())["jobs"]
    if job["job_state"] == "PENDING" and not job["array_job_id"]
)  # fmt: skip


def job(job_id: int, output: str, folder: Path | str = "/", **more: Any) -> dict[str, Any]:
    """A record of `squeue --json` of a job that waits."""
    own = {"job_id": job_id, "standard_output": output, "current_working_directory": str(folder)}
    return {**WAITS, **own, **more}


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """What squeue lists."""
    records: Queue = []
    monkeypatch.setattr(slurm_commands, "queue", lambda job_ids=(): records)
    monkeypatch.setattr(slurm_commands, "accounting", lambda job_ids: None)
    monkeypatch.setattr(slurm_commands, "completions", lambda job_ids: [])
    return records


@pytest.fixture
def sbatch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], str]], None]:
    """`sbatch(answer)`: what submitting does from now on."""

    def use(answer: Callable[[], str]) -> None:
        def submit(script: Path, *, options: Sequence[str] = ()) -> str:
            return answer()

        monkeypatch.setattr(submission, "submit", submit)

    use(lambda: "42")
    return use


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "alpha"
    manifest.open_run(folder, "alpha", {"a": 1}, ())
    (folder / "job.sbatch").write_text("#!/bin/bash\n")
    return folder


def starts(folder: Path) -> list[dict[str, Any]]:
    return manifest.gather(folder).starts


def send_and_die(folder: Path, start: dict[str, Any]) -> None:
    """A launcher whose machine goes down right after sbatch's answer."""
    if not (pid := os.fork()):
        with locked(folder / SUBMIT_LOCK), noted(folder, start) as send:
            send(folder / "job.sbatch")
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def refuse() -> str:
    raise SlurmRefused("sbatch: no")


def absent() -> str:
    raise SlurmAbsent("sbatch: not found")


def hang() -> str:
    raise SlurmUnavailable("sbatch: no answer from Slurm in 60 s")


def test_a_job_that_was_sent_is_in_the_manifest(folder, sbatch):
    with noted(folder, {"ranks": 2, "cases": [0, 3]}) as send:
        assert send(folder / "job.sbatch") == "42"
    (start,) = starts(folder)
    assert (start["job_id"], start["ranks"], start["cases"]) == ("42", 2, [0, 3])
    assert start.keys() >= {"time", "git_commit", "modified", "constraints_sha256"}
    assert not (folder / MARK).exists()


def test_it_is_also_where_the_id_could_not_be_printed(folder, sbatch):
    def submit() -> None:
        with noted(folder, {"ranks": 2}) as send:
            send(folder / "job.sbatch")
            raise BrokenPipeError  # what `| head` does to a print

    with pytest.raises(BrokenPipeError):
        submit()
    assert [start["job_id"] for start in starts(folder)] == ["42"]
    assert not (folder / MARK).exists()


@pytest.mark.parametrize("answer", [refuse, absent])
def test_a_job_that_was_not_submitted_leaves_nothing(folder, sbatch, answer):
    sbatch(answer)
    with pytest.raises((SlurmRefused, SlurmAbsent)), noted(folder, {"ranks": 2}) as send:
        send(folder / "job.sbatch")
    assert starts(folder) == []
    assert not (folder / MARK).exists()


def test_the_job_of_a_launcher_that_died_is_found(folder, sbatch, queue, capsys):
    send_and_die(folder, {"ranks": 2, "cases": [1]})
    assert starts(folder) == []
    queue.append(job(42, f"{folder}/logs/%j.log"))
    assert main(["status", "--runs", str(folder.parent)]) == 0
    assert "alpha: job 42 PENDING" in capsys.readouterr().out
    (start,) = starts(folder)
    assert (start["job_id"], start["ranks"], start["cases"]) == ("42", 2, [1])
    assert not (folder / MARK).exists()


def test_it_is_not_submitted_again(folder, sbatch, queue, capsys):
    send_and_die(folder, {"ranks": 2})
    queue.append(job(42, f"{folder}/logs/%j.log"))
    words = ["--runs", str(folder.parent), "--name", "alpha", "--nodes", "1", "--", "true"]
    assert main(["submit", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "job 42 of alpha is in the queue" in error
    assert main(["resume", "--runs", str(folder.parent), "alpha"]) == 2
    assert "job 42 of alpha is PENDING" in capsys.readouterr().err
    assert [start["job_id"] for start in starts(folder)] == ["42"]


def test_where_slurm_gave_no_answer_it_is_asked_later(folder, sbatch, queue, monkeypatch, capsys):
    """Both sbatch, which may have done it, and then squeue."""
    sbatch(hang)
    with pytest.raises(SlurmUnavailable), noted(folder, {"ranks": 2}) as send:
        send(folder / "job.sbatch")
    with monkeypatch.context() as silent:
        silent.setattr(slurm_commands, "queue", lambda job_ids=(): hang())
        assert main(["status", "--runs", str(folder.parent)]) == 0
        assert capsys.readouterr().out == (
            "alpha: no job is known: its submission was cut short, and Slurm does not say what "
            "came of it; sbatch: no answer from Slurm in 60 s\n"
        )
        with pytest.raises(SlurmUnavailable):
            recover(folder)
    queue.append(job(42, f"{folder}/logs/%j.log"))
    assert recover(folder) == ["42"]


def test_who_only_looks_does_not_disturb_a_submission(folder, sbatch, queue):
    queue.append(job(42, f"{folder}/logs/%j.log"))
    with locked(folder / SUBMIT_LOCK), noted(folder, {"ranks": 2}) as send:
        assert recover_if_free(folder) == "it is being submitted"
        assert starts(folder) == []
        send(folder / "job.sbatch")
        recover_if_free(folder)
        assert starts(folder) == []
    assert [start["job_id"] for start in starts(folder)] == ["42"]


def test_a_young_mark_without_a_job_is_kept(folder, sbatch, queue):
    """An sbatch outlives its launcher, but not for long."""
    send_and_die(folder, {"ranks": 2})
    assert recover_if_free(folder) == "its submission was cut short just now"
    assert (folder / MARK).exists()
    facts = json.loads((folder / MARK).read_text())
    old = {**facts, "time": int(time.time() - slurm_commands.CHANGE_SECONDS - 1)}
    (folder / MARK).write_text(json.dumps(old))
    assert recover(folder) == []
    assert not (folder / MARK).exists()


def test_a_job_that_is_noted_is_not_noted_again(folder, sbatch, queue):
    with noted(folder, {"ranks": 2}) as send:
        send(folder / "job.sbatch")
    send_and_die(folder, {"ranks": 2})
    queue += [job(42, f"{folder}/logs/%j.log"), job(43, f"{folder}/cases/000-x/logs/%j.log")]
    assert recover(folder) == ["43"]
    assert [start["job_id"] for start in starts(folder)] == ["42", "43"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"time": "now"}'])
def test_a_mark_that_cannot_be_read_is_named(folder, queue, capsys, text):
    (folder / MARK).write_text(text)
    assert main(["status", "--runs", str(folder.parent)]) == 2
    error = capsys.readouterr().err
    assert str(folder / MARK) in error
    other = folder.parent / "other"
    manifest.record_start(other, "other", {}, (), {"ranks": 1})
    assert main(["status", "--runs", str(folder.parent), "other"]) == 0
    assert error.count("\n") == 1


@pytest.mark.parametrize("way", ["squeue --json", "scontrol"])
def test_jobs_are_known_by_the_folder_they_write_into(tmp_path, queue, monkeypatch, way):
    """Waiting elements of an array, a path relative to the job's folder, blanks in it."""
    place = tmp_path / "50, a b"
    outputs = {
        1: f"{tmp_path}/50, a b/logs/%j.log",
        2: f"{tmp_path}/50, a b/cases/000-x/logs/%j.log",
        3: f"{tmp_path}/50, a b c/logs/%j.log",
        4: f"{tmp_path}/logs/%j.log",
        5: "50, a b/logs/%j.log",
        6: f"{tmp_path}/50, a b/logs/%A_%a.log",
        7: f"{tmp_path}/50, a b/logs/%j.log",
    }
    array = {"array_job_id": 6, "array_task_id": None, "array_task_string": "0-2"}
    ended = {"job_state": "COMPLETED"}
    for number, output in outputs.items():
        more = {6: array, 7: ended}.get(number, {})
        queue.append(job(number, output, tmp_path, **more))
    if way == "scontrol":
        waits = (RECORDED / "scontrol-22.05.txt").read_text().splitlines()
        (text,) = [line for line in waits if line.startswith("JobId=12 ")]
        head, _, rest = text.partition(" StdOut=")
        records = []
        for number, output in outputs.items():
            record = head.replace("JobId=12 ", f"JobId={number} ")
            if number == 6:
                record = record.replace("JobId=6 ", "JobId=6 ArrayJobId=6 ArrayTaskId=0-2 ")
            if number == 7:
                record = record.replace("JobState=PENDING", "JobState=COMPLETED")
            path = output.replace("%j", str(number)).replace("%A", str(number))
            records.append(f"{record} StdOut={tmp_path / path} {rest.partition(' ')[2]}")
        monkeypatch.setattr(slurm_commands, "queue", lambda job_ids=(): None)
        monkeypatch.setattr(slurm_commands, "show_job", lambda job_id="": records)
    assert unfinished_jobs_in(place) == ["1", "2", "5", "6"]
