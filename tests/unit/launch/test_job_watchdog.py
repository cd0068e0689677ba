"""The watchdog of a job's script: it ends ranks that show no progress, and only those."""

import os
import signal
import subprocess
import time

import pytest

from launch.slurm import script
from tests.slurm.cluster import processes_with
from tests.unit.launch.test_job_attempts import Job

# The stand-in for srun is the rank itself, and writes no log: what it prints goes to the script's.
WAIT = "for i in $(seq 600); do /bin/sleep 0.1; done"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "STACK_SECONDS", 1)
    monkeypatch.setattr(script, "END_SECONDS", 1)


def test_ranks_without_progress_show_their_stacks_and_are_ended(tmp_path):
    hung = Job(tmp_path, f"trap 'echo stacks' USR2; {WAIT}", hang_seconds=1, backoff_seconds=500)
    done = hung.run()
    assert "stacks\n" in done.stdout
    assert done.returncode == 124
    assert hung.end() == (124, "hung: no progress for 1 s; requeued")
    assert hung.asked("update") == ["update JobId=70000 StartTime=now+500"]


def test_an_srun_that_does_not_end_is_killed(tmp_path):
    hung = Job(tmp_path, f"trap 'echo stacks' USR2; trap '' TERM; {WAIT}", hang_seconds=1)
    assert hung.run().returncode == 124


@pytest.mark.parametrize("way", ["progress file", "first log", "last log"])
def test_ranks_that_get_on_are_left_alone(tmp_path, way):
    """They write every tenth of a second, for longer than the watchdog waits."""
    file = {
        "progress file": '"$MEGATRON_MONE_PROGRESS"',
        "first log": '"run/logs/$MEGATRON_MONE_ATTEMPT/rank-00000.log"',
        "last log": '"run/logs/$MEGATRON_MONE_ATTEMPT/rank-00005.log"',
    }[way]
    rank = f"for i in $(seq 40); do echo $i >>{file}; /bin/sleep 0.1; done"
    gets_on = Job(tmp_path, rank, hang_seconds=2, nodes=2, tasks_per_node=3)
    assert gets_on.run().returncode == 0
    assert gets_on.end() == (0, "finished")


def test_ranks_that_end_in_time_keep_their_status(tmp_path):
    failed = Job(tmp_path, "exit 7", hang_seconds=2)
    assert failed.run().returncode == 7


def test_a_hung_run_that_finishes_when_asked_has_finished(tmp_path):
    late = Job(tmp_path, f"trap 'exit 0' USR2; {WAIT}", hang_seconds=1)
    assert late.run().returncode == 0
    assert late.end() == (0, "finished")


def test_the_stop_signal_still_reaches_the_ranks(tmp_path):
    rank = "trap 'echo 6 >run/checkpoints/latest_checkpointed_iteration.txt; exit 75' USR1; "
    stopped = Job(
        tmp_path, f"{rank} kill -USR1 $PPID; {WAIT}", hang_seconds=600, saves_checkpoints=True
    )
    stopped.saved(5)
    assert stopped.run().returncode == 75
    assert stopped.end() == (75, "requeued after a checkpoint")


def _start(watched: Job, marker: str) -> subprocess.Popen[bytes]:
    path = watched.slurm.folder / "slurm_script"
    path.write_text(watched.text)
    own = {
        "PATH": f"{watched.slurm.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "70000",
        "SLURM_JOB_NODELIST": "n0", "SLURM_STATE": "", "CONFIG": "", "MARKER": marker,
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(path)], env={**os.environ, **own}, cwd=watched.path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_watchdog_ends_with_the_ranks(tmp_path):
    watched = Job(tmp_path, "/bin/sleep 1", hang_seconds=600)
    marker = f"watchdog-of-{tmp_path}"
    assert _start(watched, marker).wait(300) == 0
    assert not processes_with(marker)


def test_the_watchdog_ends_with_a_script_that_is_killed(tmp_path):
    watched = Job(tmp_path, f"echo $$ >rank; {WAIT}", hang_seconds=60)
    marker = f"watchdog-of-{tmp_path}"
    started = _start(watched, marker)
    _until(lambda: (tmp_path / "rank").exists() and (tmp_path / "rank").read_text())
    started.kill()
    started.wait()
    os.kill(int((tmp_path / "rank").read_text()), signal.SIGSTOP)  # a rank that outlives the script
    try:
        _until(lambda: len(processes_with(marker)) == 1)  # the rank
    finally:
        os.kill(int((tmp_path / "rank").read_text()), signal.SIGKILL)
    _until(lambda: not processes_with(marker))


def _until(ready) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)
