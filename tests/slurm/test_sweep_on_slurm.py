"""A sweep as a job array of a real Slurm: three trainings, and what a second start does."""

import json
import re
from pathlib import Path

import pytest

from launch.slurm import commands as slurm_commands
from launch.slurm.state import job_states
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import wait_end, wait_until
from tests.slurm.training import FLAGS, ends_of_logs, launch

DEMO = ["--config", "configs/demo-mone.yaml"]
SITE = ["--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "1"]
SITE += ["--no-preflight", "--no-exclusive", "--memory", "0"]
SITE += ["--time-limit", "10", "--signal-lead-seconds", "0"]
RANK = ["--", *FLAGS, "--expert-model-parallel-size", "1"]
STEPS = 3


def _results(folder: Path) -> list[dict]:
    launch("results", "--runs", str(folder.parent), folder.name)
    return json.loads((folder / "results.json").read_text())["cases"]


@pytest.mark.slow
def test_an_array_of_three_trains_and_is_one_table(cluster: Cluster, tmp_path: Path) -> None:
    """The same command, given while it runs and when it has ended, submits nothing more."""
    words = ["sweep", *DEMO, *SITE, "--runs", str(tmp_path), "--name", "s"]
    own = ["--train-iters", str(STEPS), "--lr-decay-iters", str(STEPS), "--eval-iters", "1"]
    evaluation = ["--eval-interval", str(STEPS)]
    command = [*words, "--grid", "r=1/2,1/4,1/8", *RANK, *own, *evaluation]
    said = launch(*command)
    found = re.match(r"0 of 3 cases are finished, 3 are submitted: job (\d+)\n", said)
    assert found, said
    again = launch(*command)
    assert "none is missing" in again
    for number in range(3):
        assert wait_end(f"{found[1]}_{number}").state == "COMPLETED", ends_of_logs(tmp_path / "s")
    rows = _results(tmp_path / "s")
    assert [row["values"]["mone_neuron_ratio"] for row in rows] == ["0.5", "0.25", "0.125"]
    for row in rows:
        assert (row["state"], row["steps"]) == ("finished", STEPS)
        assert row["step_ms"] > 0
        assert row["peak_gib"] > 0
    # The ratio reached each training: other models, other losses.
    assert len({row["training_loss"] for row in rows}) == 3
    assert len({row["validation_loss"] for row in rows}) == 3
    assert launch(*command).startswith("3 of 3 cases are finished, none is missing\n")
    starts = json.loads((tmp_path / "s/manifest.json").read_text())["starts"]
    assert [start["job_id"] for start in starts] == [found[1]]


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    """A sweep whose ranks run a stand-in for Python: it fails or waits where a file says so."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/bash
ratio="${{@: -1}}"
echo "$ratio" >>{tmp_path}/started
[ ! -e {tmp_path}/fail-$ratio ] || exit 9
while [ -e {tmp_path}/wait-$ratio ]; do sleep .1; done
"""
    )
    python.chmod(0o755)
    place = [
        "--runs",
        str(tmp_path),
        "--name",
        "s",
        "--virtual-environment",
        str(python.parents[1]),
    ]
    return ["sweep", *DEMO, *SITE, "--no-requeue", *place]


def test_only_what_is_missing_is_submitted_again(
    cluster: Cluster, tmp_path: Path, sweep: list[str]
) -> None:
    """Of four cases one failed, one was cancelled, one runs on; a grown grid has a fifth."""
    grid = "r=1,1/2,1/4,1/8"
    fails, hangs, runs = (tmp_path / name for name in ("fail-0.5", "wait-0.25", "wait-0.125"))
    for path in (fails, hangs, runs):
        path.touch()
    job = _submitted(launch(*sweep, "--grid", grid, *RANK))
    wait_until(f"{job}_0", lambda _: _has_started(tmp_path, 4))
    wait_end(f"{job}_1")
    slurm_commands.cancel(f"{job}_2")
    wait_end(f"{job}_2")
    # Slurm ends jobs before it says so of all of them.
    states = {state.array_task: state.state for state in job_states([job])}
    assert states == {"0": "COMPLETED", "1": "FAILED", "2": "CANCELLED", "3": "RUNNING"}
    fails.unlink()
    hangs.unlink()
    said = launch(*sweep, "--grid", f"{grid},1/16", *RANK)
    assert said.startswith("1 of 5 cases are finished, 1 is running, 3 are submitted: job ")
    second = _submitted(said)
    for number in (1, 2, 4):
        assert wait_end(f"{second}_{number}").state == "COMPLETED"
    assert {state.array_task for state in job_states([second])} == {"1", "2", "4"}
    started = sorted((tmp_path / "started").read_text().split())
    assert started == sorted(["1", "0.5", "0.25", "0.125", "0.5", "0.25", "0.0625"])
    rows = _results(tmp_path / "s")
    assert [row["state"] for row in rows] == [*["finished"] * 3, "running", "finished"]
    assert "job " + job in launch("cancel", "--runs", str(tmp_path), "s")
    assert wait_end(f"{job}_3").state == "CANCELLED"
    assert _results(tmp_path / "s")[3]["state"] == "failed: cancelled by Slurm"
    runs.unlink()
    resumed = launch("resume", "--runs", str(tmp_path), "s").split()[-1]
    assert wait_end(f"{resumed}_3").state == "COMPLETED"
    assert {row["state"] for row in _results(tmp_path / "s")} == {"finished"}


def _submitted(said: str) -> str:
    found = re.search(r"submitted: job (\d+)\n", said)
    assert found, said
    return found[1]


def _has_started(folder: Path, count: int) -> bool:
    path = folder / "started"
    return path.exists() and len(path.read_text().split()) >= count
