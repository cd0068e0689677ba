"""What is sent to Slurm's commands, and what comes of what they say: with stand-ins on the PATH."""

import os
import shlex
from pathlib import Path

import pytest

from launch.slurm import commands as slurm_commands
from launch.slurm.commands import SlurmRefused, SlurmUnavailable

RECORDED = Path(__file__).with_name("recorded")


class StandIns:
    """Programs of Slurm's names that say what a test wants, and keep their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def say(self, name: str, out: str = "", err: str = "", status: int = 0) -> None:
        program = self.folder / name
        kept = shlex.quote(str(self.folder / f"{name}.argv"))
        lines = [
            f'for a in "$@"; do printf \'%s\\0\' "$a"; done >{kept}',
            f"printf %s {shlex.quote(out)}",
            f"printf %s {shlex.quote(err)} >&2",
            f"exit {status}",
        ]
        program.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
        program.chmod(0o755)

    def arguments(self, name: str) -> list[str]:
        return (self.folder / f"{name}.argv").read_text().split("\0")[:-1]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return StandIns(folder)


@pytest.mark.parametrize("said", ["123\n", "123;cluster\n"])
def test_submit_gives_the_job_id(slurm: StandIns, tmp_path: Path, said: str) -> None:
    slurm.say("sbatch", out=said, err="sbatch: warning: something\n")
    hostile = tmp_path / "-x $(touch executed); 'a' \"b\".sh"
    assert slurm_commands.submit(hostile, options=["--comment=$(touch executed)\n"]) == "123"
    expected = ["--parsable", "--comment=$(touch executed)\n", "--", str(hostile)]
    assert slurm.arguments("sbatch") == expected
    assert not list(tmp_path.rglob("executed"))


def test_submit_makes_the_path_absolute(
    slurm: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slurm.say("sbatch", out="1\n")
    slurm_commands.submit(Path("-x.sh"))
    assert slurm.arguments("sbatch")[-1] == f"{tmp_path}/-x.sh"


def test_test_only_gives_slurms_answer_in_one_line(slurm: StandIns, tmp_path: Path) -> None:
    slurm.say("sbatch", err="sbatch: Job 4 to start at 2030-01-31T12:00:00\n")
    answer = slurm_commands.submit(tmp_path / "a.sh", test_only=True)
    assert answer == "Job 4 to start at 2030-01-31T12:00:00"
    assert "--test-only" in slurm.arguments("sbatch")


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "sbatch: error: invalid partition specified: x\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "sbatch: invalid partition specified: x; Invalid partition name specified; "
            "`sinfo -s` lists the partitions",
        ),
        (
            "sbatch: error: Batch job submission failed: Something of a later release\n",
            "sbatch: Something of a later release",
        ),
        (
            "sbatch: unrecognized option '--bogus'\nTry \"sbatch --help\" for more information\n",
            "sbatch: unrecognized option '--bogus'; "
            "`sbatch --help` lists the options of this Slurm",
        ),
        ("", "sbatch: ended with status 1"),
    ],
)
def test_a_refusal_is_one_line_with_the_fix(
    slurm: StandIns, tmp_path: Path, said: str, line: str
) -> None:
    slurm.say("sbatch", err=said, status=1)
    with pytest.raises(SlurmRefused) as caught:
        slurm_commands.submit(tmp_path / "a.sh")
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("Unable to contact slurm controller (connect failure)", "slurmctld is down"),
        ("Protocol authentication error", "munged runs"),
        ("Socket timed out on send/recv operation", "overloaded"),
        ("Could not establish a configuration source", "SLURM_CONF"),
        ("Unable to process configuration file", "SLURM_CONF"),
    ],
)
def test_no_answer_is_told_from_a_refusal(slurm: StandIns, said: str, fix: str) -> None:
    slurm.say("scancel", err=f"scancel: error: {said}\n", status=1)
    with pytest.raises(SlurmUnavailable, match=fix) as caught:
        slurm_commands.cancel("3")
    assert str(caught.value).startswith(f"scancel: {said}")


def test_a_missing_slurm_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmUnavailable, match=r"^sbatch: not found: .*login node.*slurm-client"):
        slurm_commands.submit(tmp_path / "a.sh")


@pytest.mark.parametrize("job_id", ["", "abc", "-u", "1 2", "1_", "1,2", "1\n", "--me", "1;rm"])
def test_what_is_no_job_id_reaches_no_command(slurm: StandIns, job_id: str) -> None:
    for function in (slurm_commands.cancel, slurm_commands.requeue, slurm_commands.show_job):
        with pytest.raises(ValueError, match="give Slurm's number"):
            function(job_id)
    with pytest.raises(ValueError, match="give Slurm's number"):
        slurm_commands.queue(["1", job_id])
    assert list(slurm.folder.iterdir()) == []


def test_arguments_of_the_other_commands(slurm: StandIns) -> None:
    slurm.say("scancel")
    slurm_commands.cancel("12_3")
    assert slurm.arguments("scancel") == ["12_3"]
    slurm.say("scontrol")
    slurm_commands.requeue("12")
    assert slurm.arguments("scontrol") == ["requeue", "12"]
    slurm_commands.update("12", StartTime="now+2", Comment="two words")
    assert slurm.arguments("scontrol") == [
        "update",
        "JobId=12",
        "StartTime=now+2",
        "Comment=two words",
    ]


def test_a_json_answer_with_errors_is_no_empty_queue(slurm: StandIns) -> None:
    """22.05 ends with status 0 where the controller is down; recorded from it."""
    slurm.say("squeue", out=(RECORDED / "squeue-22.05-no-controller.json").read_text())
    with pytest.raises(SlurmUnavailable, match="slurmctld is down or unreachable"):
        slurm_commands.queue(["1"])


@pytest.mark.parametrize(
    "said", ["squeue: unrecognized option '--json'", "squeue: fatal: no serializer/json plugin"]
)
def test_a_slurm_without_json_is_told(slurm: StandIns, said: str) -> None:
    slurm.say("squeue", err=said, status=1)
    assert slurm_commands.queue(["1"]) is None


def test_a_job_the_queue_does_not_know_is_no_error(slurm: StandIns) -> None:
    slurm.say("squeue", err="slurm_load_jobs error: Invalid job id specified\n", status=1)
    assert slurm_commands.queue(["1"]) == []


def test_sacct_that_is_disabled_or_dies(slurm: StandIns) -> None:
    slurm.say("sacct", err="Slurm accounting storage is disabled\n", status=1)
    assert slurm_commands.accounting(["1"]) is None
    slurm.say("sacct", status=139)
    assert slurm_commands.completions(["1"]) == []
    slurm.say("sacct", err="sacct: error: Problem talking to the database: Connection refused\n",
              status=1)  # fmt: skip
    with pytest.raises(SlurmUnavailable, match="accounting database is down"):
        slurm_commands.accounting(["1"])


def test_times_come_as_seconds_and_task_lists_whole(
    slurm: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    program = slurm.folder / "scontrol"
    program.write_text('#!/bin/bash\necho "JobId=1 $SLURM_TIME_FORMAT $SLURM_BITSTR_LEN"\n')
    program.chmod(0o755)
    assert slurm_commands.show_job("1") == ["JobId=1 %s 0"]
    sbatch = slurm.folder / "sbatch"
    sbatch.write_text('#!/bin/bash\necho "$SLURM_TIME_FORMAT" >&2\n')
    sbatch.chmod(0o755)
    # Its estimate is for people.
    assert slurm_commands.submit(Path("a.sh"), test_only=True) == "relative"


def test_a_command_that_hangs_is_ended(slurm: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_commands, "READ_SECONDS", 0.2)
    program = slurm.folder / "squeue"
    program.write_text("#!/bin/bash\nexec sleep 3\n")
    program.chmod(0o755)
    with pytest.raises(SlurmUnavailable, match=r"no answer from Slurm in 0.2 s; try again later"):
        slurm_commands.queue(["1"])


def test_a_client_that_a_signal_ended_gave_no_answer(slurm: StandIns) -> None:
    slurm.say("squeue")
    (slurm.folder / "squeue").write_text("#!/bin/bash\nkill -9 $$\n")
    with pytest.raises(SlurmUnavailable, match="squeue: ended by SIGKILL; try again later"):
        slurm_commands.queue(["1"])


def test_a_connection_that_the_controller_closes_does_not_end_a_client(slurm: StandIns) -> None:
    slurm.say("squeue")
    answer = """#!/bin/bash\nkill -PIPE $$\necho '{"jobs": []}'\n"""
    (slurm.folder / "squeue").write_text(answer)
    assert slurm_commands.queue(["1"]) == []
