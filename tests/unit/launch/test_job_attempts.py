"""What a job's script does after its ranks: start again, later, elsewhere, or not at all."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.slurm.script import sbatch_script
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.hostile_text import CANARY
from tests.unit.launch.launch_cases import job

STEP = "run/checkpoints/latest_checkpointed_iteration.txt"
# Every request to scontrol leaves a line; the variables in capitals say what Slurm answers.
SCONTROL = """echo "$*" >>"${0%/*}/asked"
case "$1 $2" in
"show hostnames") echo n0; echo n1;;
"show config") echo "$CONFIG";;
requeue*) echo x >>"${0%/*}/tries"; [ "$(wc -l <"${0%/*}/tries")" -gt "${DEAF:-0}" ];;
update*) [ -z "${REFUSES:-}" ];;
esac"""
SQUEUE = """case "$*" in
*%T*) echo "$SLURM_STATE";;
*%x*) echo "$EXCLUDED";;
*RestartCnt*) [ -z "$SLURM_STATE" ] || echo "$SLURM_STATE ${RESTARTS:-$SLURM_RESTART_COUNT}";;
esac"""


class Job:
    """A job of one rank that runs some bash, and what its script did."""

    def __init__(self, tmp_path: Path, rank: str, /, python: str = "", **fields: Any) -> None:
        self.path = tmp_path
        own = {"workdir": str(tmp_path), "folder": str(tmp_path / "run"), "requeue": True}
        own |= {"command": ("bash", "-c", rank), "virtual_environment": str(tmp_path / "venv")}
        self.text = sbatch_script(job(**{**own, **fields}))
        (tmp_path / "slurm").mkdir()
        self.slurm = FakeSlurm(
            tmp_path / "slurm", scontrol=SCONTROL, squeue=SQUEUE, sleep=":", python=python
        )

    def run(self, restarts: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        """One attempt."""
        (self.slurm.folder / "asked").write_text("")
        own = {"SLURM_STATE": "RUNNING", "CONFIG": "", "EXCLUDED": ""}
        own |= {"SLURM_RESTART_COUNT": str(restarts), **variables}
        return self.slurm.run(self.text, **own)

    def asked(self, word: str) -> list[str]:
        """The requests to scontrol that begin with a word."""
        lines = (self.slurm.folder / "asked").read_text().splitlines()
        return [line for line in lines if line.startswith(word)]

    def end(self, restarts: int = 0) -> tuple[int, str]:
        """Status and reason of an attempt."""
        value = json.loads((self.path / f"run/attempts/70000.{restarts}.end.json").read_text())
        return value["status"], value["reason"]

    def saved(self, step: int) -> None:
        """As if the ranks had saved a step."""
        (self.path / STEP).parent.mkdir(parents=True, exist_ok=True)
        (self.path / STEP).write_text(str(step))


@pytest.mark.parametrize("status", [1, 9, 74, 134, 137])
def test_a_failure_is_requeued(tmp_path, status):
    failed = Job(tmp_path, f"exit {status}", backoff_seconds=300)
    assert failed.run().returncode == status
    assert failed.asked("requeue") == ["requeue 70000"]
    assert failed.asked("update") == ["update JobId=70000 StartTime=now+300"]
    assert failed.end() == (status, f"failed with status {status}; requeued")


@pytest.mark.parametrize(
    "answer", [{"SLURM_STATE": "PENDING"}, {"RESTARTS": "1"}, {"SLURM_STATE": "COMPLETING"}]
)
@pytest.mark.parametrize("status", [0, 1, 143])
def test_a_job_that_slurm_took_away_has_not_finished(tmp_path, answer, status):
    """srun's status, where its node is lost or its job cancelled, is 0 or that of killed ranks."""
    lost = Job(tmp_path, f"exit {status}")
    assert lost.run(**answer).returncode == 143
    assert lost.end() == (143, "ended by Slurm: a node was lost, or the job cancelled")
    assert not lost.asked("requeue")
    assert not list((tmp_path / "run" / "attempts").glob("*.failures"))


BANNER = "echo '*** Welcome to the cluster ***'; echo; "


def test_a_banner_of_slurm_s_programs_is_no_answer(tmp_path):
    """Before each answer: nothing is taken away, refused or renamed by it."""
    done = Job(tmp_path, '[ -e again ] && echo "at $MASTER_ADDR" || exit 9', saves_checkpoints=True)
    for name, code in {"squeue": SQUEUE, "scontrol": SCONTROL}.items():
        (done.slurm.folder / name).write_text(f"#!/bin/bash\n{BANNER}\n{code}\n")
    (tmp_path / "run/attempts").mkdir(parents=True)
    (tmp_path / "run/attempts/600.0.start.json").write_text("{}")  # another job, not running
    assert done.run(EXCLUDED="n[7-9]").returncode == 9
    assert done.asked("requeue") == ["requeue 70000"]
    assert done.end() == (9, "failed with status 9; requeued")
    (tmp_path / "again").touch()
    ended = done.run(1)
    assert ended.returncode == 0, ended.stderr
    assert "at n0\n" in ended.stdout
    assert done.end(1) == (0, "finished")


def test_a_job_whose_hosts_slurm_does_not_name_ends_in_a_line(tmp_path):
    lost = Job(tmp_path, "exit 0")
    (lost.slurm.folder / "scontrol").write_text(f"#!/bin/bash\n{BANNER}")
    done = lost.run()
    assert done.returncode == 75
    assert done.stderr == "megatron-mone: error: scontrol names no host of n[0-1]\n"


def test_where_slurm_does_not_answer_the_ranks_are_believed(tmp_path):
    ended = Job(tmp_path, "exit 0")
    assert ended.run(SLURM_STATE="").returncode == 0
    assert ended.end() == (0, "finished")


@pytest.mark.parametrize("status", [0, 2, 3, 75, 76, 130])
def test_an_end_that_would_be_the_same_again_is_not_requeued(tmp_path, status):
    ended = Job(tmp_path, f"exit {status}", saves_checkpoints=True)
    assert ended.run().returncode == status
    assert not ended.asked("requeue")


def test_a_run_that_another_attempt_took_over_says_so(tmp_path):
    lost = Job(tmp_path, "exit 76")
    lost.run()
    assert lost.end() == (76, "another attempt took over")


def test_without_requeue_a_failure_is_the_end(tmp_path):
    failed = Job(tmp_path, "exit 1", requeue=False)
    failed.run()
    assert not failed.asked("requeue")
    assert failed.end() == (1, "failed with status 1")


def test_the_wait_doubles_up_to_its_limit(tmp_path):
    """backoff_seconds * 2^(n - 1) for the n-th failure in a row, at most the limit."""
    failed = Job(
        tmp_path, "exit 1", backoff_seconds=200, backoff_limit_seconds=1000, max_failures=6
    )
    waits = []
    for restarts in range(6):
        failed.run(restarts)
        waits += [line.rpartition("+")[2] for line in failed.asked("update")]
    assert [int(wait) for wait in waits] == [min(200 * 2**n, 1000) for n in range(5)]
    assert failed.end(5) == (1, "failed with status 1; gave up: failed 6 times")


@pytest.mark.parametrize(
    ("config", "asks"),
    [
        ("AuthInfo                = socket=/run/x", False),
        ("AuthInfo                = socket=/run/x,cred_expire=100", True),
        ("AuthInfo                = cred_expire=119,socket=/run/x", True),
        ("AuthInfo                = cred_expire=300", False),
    ],
)
def test_slurm_s_own_wait_is_never_shortened(tmp_path, config, asks):
    """A requeued job waits for its old credential to expire, 120 s where no one says otherwise."""
    failed = Job(tmp_path, "exit 1", backoff_seconds=120)
    failed.run(CONFIG=config)
    assert bool(failed.asked("update")) is asks


def test_a_saved_step_begins_the_count_anew(tmp_path):
    failed = Job(tmp_path, "exit 1", saves_checkpoints=True, max_failures=2, backoff_seconds=500)
    failed.saved(40)
    failed.run(0)
    failed.saved(50)
    failed.run(1)
    assert failed.asked("requeue")
    assert failed.asked("update") == ["update JobId=70000 StartTime=now+500"]
    failed.run(2)
    assert not failed.asked("requeue")
    assert failed.end(2) == (1, "failed with status 1; gave up: failed 2 times since step 50")


def test_a_success_begins_the_count_anew(tmp_path):
    failed = Job(tmp_path, "[ -e good ]", max_failures=2)
    failed.run(0)
    (tmp_path / "good").touch()
    failed.run(1)
    (tmp_path / "good").unlink()
    failed.run(2)
    assert failed.asked("requeue")


def test_another_job_of_the_run_counts_for_itself(tmp_path):
    """Whoever submits it again wants it tried again."""
    failed = Job(tmp_path, "exit 1", max_failures=2)
    for number in ("70000", "70001"):
        failed.run(SLURM_JOB_ID=number)
        assert failed.asked("requeue") == [f"requeue {number}"]


def test_the_count_is_data(tmp_path):
    failed = Job(tmp_path, "exit 1", max_failures=2)
    (tmp_path / "run/attempts").mkdir(parents=True)
    for text in (f"a[$(touch\t{CANARY})] none", "", "-5 none", "9" * 30 + " none", "08 none"):
        (tmp_path / "run/attempts/70000.failures").write_text(text)
        failed.run()
        assert failed.end() == (1, "failed with status 1; requeued")
    assert not list(tmp_path.rglob(CANARY))


def test_an_element_of_an_array_is_requeued_alone(tmp_path):
    """The job number of an array's last element names the whole array."""
    failed = Job(tmp_path, "exit 1", array="0-2", backoff_seconds=500)
    failed.run(SLURM_JOB_ID="69", SLURM_ARRAY_JOB_ID="69", SLURM_ARRAY_TASK_ID="2")
    assert failed.asked("requeue") == ["requeue 69_2"]
    assert failed.asked("update") == ["update JobId=69_2 StartTime=now+500"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_cancelled_job_does_not_come_back(tmp_path, state):
    failed = Job(tmp_path, "exit 1")
    failed.run(SLURM_STATE=state)
    assert not failed.asked("requeue")
    assert failed.end() == (143, "ended by Slurm: a node was lost, or the job cancelled")


def test_a_controller_that_is_away_is_asked_again(tmp_path):
    failed = Job(tmp_path, "exit 1")
    failed.run(DEAF="3", SLURM_STATE="")
    assert len(failed.asked("requeue")) == 4
    assert failed.end() == (1, "failed with status 1; requeued")


def test_a_controller_that_stays_away_is_named(tmp_path):
    failed = Job(tmp_path, "exit 1")
    done = failed.run(DEAF="99")
    assert "was not requeued: Slurm did not take it" in done.stderr
    assert failed.end() == (1, "failed with status 1; not requeued: Slurm did not take it")
    assert done.returncode == 1


def test_a_change_that_slurm_refuses_is_told(tmp_path):
    failed = Job(tmp_path, "exit 1", backoff_seconds=500)
    done = failed.run(REFUSES="1")
    assert "job 70000 was requeued without StartTime=now+500" in done.stderr
    assert failed.end() == (1, "failed with status 1; requeued")
    assert done.returncode == 1


def test_the_ranks_know_their_attempt(tmp_path):
    ran = Job(tmp_path, 'echo "$MEGATRON_MONE_ATTEMPT $MEGATRON_MONE_PROGRESS"')
    done = ran.run(3)
    assert f"70000.3 {tmp_path}/run/attempts/70000.3.progress\n" in done.stdout
