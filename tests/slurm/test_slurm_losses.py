"""Lost power on a real Slurm: of a node, of the controller; and a time limit that passes."""

import signal
from pathlib import Path

import pytest

from launch.slurm import commands as slurm_commands
from launch.slurm.commands import SlurmUnavailable
from launch.slurm.state import job_states
from tests.slurm.conftest import Boot, EarlyJobs
from tests.slurm.jobs import submit, wait_end, wait_until


def test_a_dead_controller_is_one_line(slurm_cluster: Boot) -> None:
    """Within 20 s: Slurm's clients give up after 9 s, and READ_SECONDS bounds them."""
    cluster = slurm_cluster(1, owner="dead")
    cluster.kill("ctld")
    assert slurm_commands.READ_SECONDS < 20
    with cluster.selected():
        with pytest.raises(SlurmUnavailable) as caught:
            job_states(["1"])
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("squeue: ")
    assert said.endswith("slurmctld is down or unreachable: try again later")


def test_a_controller_that_hangs_is_given_up(
    slurm_cluster: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not dead but stopped: connections are accepted and never answered."""
    cluster = slurm_cluster(1, owner="hangs")
    monkeypatch.setattr(slurm_commands, "READ_SECONDS", 1.0)
    monkeypatch.setattr(slurm_commands, "CHANGE_SECONDS", 2.0)
    with cluster.selected():
        cluster.signal("ctld", signal.SIGSTOP)
        with pytest.raises(SlurmUnavailable, match=r"^squeue: no answer from Slurm in 1 s; try"):
            job_states(["1"])
        with pytest.raises(SlurmUnavailable, match=r"it may still be done: look with"):
            submit(tmp_path, "true")


def test_a_job_past_its_time_limit_is_ended(early_jobs: EarlyJobs) -> None:
    with early_jobs.cluster.selected():
        state = wait_end(early_jobs.over_time)
    assert state.state == "TIMEOUT"
    assert state.time_limit_minutes == 1


def test_a_job_that_lost_a_node_is_requeued_and_completes(early_jobs: EarlyJobs) -> None:
    with early_jobs.cluster.selected():
        again = wait_until(
            early_jobs.node_lost, lambda job: job.restarts == 1 and job.state != "COMPLETING"
        )
        if again.state == "PENDING":  # Slurm would wait two minutes
            slurm_commands.update(early_jobs.node_lost, StartTime="now+2")
        done = wait_end(early_jobs.node_lost)
    assert (done.state, done.restarts) == ("COMPLETED", 1)
    # Slurm itself leaves the lost node out.
    assert early_jobs.starts.read_text().split() == ["n[1-2]", "n[1,3]"]
