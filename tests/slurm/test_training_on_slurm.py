"""Training of the demo's model as jobs of a real Slurm, two nodes over gloo, to the same losses.

One run goes through undisturbed; the others are stopped by their time limit, lose a node or lose
their controller's trust (split-brain), are started again by Slurm, and must end with the losses of
the first. Both engines are stopped and go on.
"""

import hashlib
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.runs import run_manifest as manifest
from launch.slurm import commands as slurm_commands
from launch.slurm.records import JobState
from megatron_mone.common.command_line import ERROR
from tests.slurm.cluster import Cluster, processes_with
from tests.slurm.conftest import Boot
from tests.slurm.jobs import one, wait_end, wait_until
from tests.slurm.training import (
    FLAGS,
    STEPS,
    ends_of_logs,
    freeze_at,
    launch,
    losses,
    ranks_of,
    submit_training,
    thaw,
    wait_for_signal,
)

pytestmark = pytest.mark.slow

ENGINES = {
    "megatron": (),
    "deepspeed": ("--hostfile", "--", "--engine", "deepspeed", "--zero-stage", "2"),
}
Losses = dict[str, dict[int, float]]


@pytest.fixture
def cluster(slurm_cluster: Boot) -> Iterator[Cluster]:
    with slurm_cluster(6, owner="training").selected() as selected:
        yield selected


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of this file."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(slurm_cluster: Boot, runs: Path) -> Losses:
    """The losses, by engine, of two nodes that nobody disturbs."""
    with slurm_cluster(6, owner="training").selected():
        jobs = {
            engine: submit_training(runs, f"whole-{engine}", *ENGINES[engine]) for engine in ENGINES
        }
        ends = {engine: wait_end(job) for engine, job in jobs.items()}
    found = {}
    for engine, end in ends.items():
        run = runs / f"whole-{engine}"
        assert end.state == "COMPLETED", _said(run)
        found[engine] = losses(run)
        assert sorted(found[engine]) == list(range(1, STEPS + 1))
    assert found["megatron"] != found["deepspeed"]  # in the last bits: the engine was another
    return found


def test_two_nodes_give_the_losses_of_two_ranks_here(undisturbed: Losses, tmp_path: Path) -> None:
    flags = [*FLAGS, "--expert-model-parallel-size", "2"]
    where = ["--runs", str(tmp_path), "--name", "here", "--tasks-per-node", "2"]
    curve = ["--tensorboard-dir", str(tmp_path / "here" / "curve")]
    launch("run", "--config", "configs/demo-mone.yaml", *where, "--", *flags, *curve)
    assert losses(tmp_path / "here") == undisturbed["megatron"]


def test_stopped_by_its_time_limit_a_run_goes_on_as_if_it_never_was(
    cluster: Cluster, undisturbed: Losses, runs: Path
) -> None:
    names = {engine: f"timed-{engine}" for engine in ENGINES}
    limits = ("--time-limit", "30", "--signal-lead-seconds", "70")
    jobs = {
        engine: submit_training(runs, names[engine], *limits, *ENGINES[engine])
        for engine in ENGINES
    }
    ranks = {engine: freeze_at(runs / names[engine], f"{job}.0", 5) for engine, job in jobs.items()}
    for job in jobs.values():
        _end_soon(job)
    for engine, job in jobs.items():
        wait_for_signal(ranks[engine], signal.SIGUSR1)
        slurm_commands.update(job, TimeLimit="30")  # one stop is looked at, however slow it is here
        thaw(ranks[engine])
    for engine, job in jobs.items():
        run = runs / names[engine]
        assert _wait_second_start(job).state == "COMPLETED", _said(run)
        first, second = _attempts(run)
        assert (first["status"], first["reason"]) == (75, "requeued after a checkpoint")
        assert (second["status"], second["reason"]) == (0, "finished")
        # The step at which it was stopped was saved: nothing is done twice.
        assert losses(run) == undisturbed[engine]
    nodes = _names(_attempts(runs / names["deepspeed"])[-1]["node_list"])
    hostfile = (runs / names["deepspeed"] / "hostfile").read_text()
    assert hostfile.splitlines() == [f"{node} slots=1" for node in nodes]


def test_a_run_that_lost_a_node_is_requeued_and_completes(
    cluster: Cluster, undisturbed: Losses, runs: Path
) -> None:
    job = submit_training(runs, "lost")
    ranks = freeze_at(runs / "lost", f"{job}.0", 5)
    nodes = _names(_attempts(runs / "lost")[0]["node_list"])
    cluster.kill(nodes[-1])
    thaw(ranks)
    assert _wait_second_start(job).state == "COMPLETED", _said(runs / "lost")
    second = _attempts(runs / "lost")[-1]
    assert second["reason"] == "finished"
    assert nodes[-1] not in _names(second["node_list"])
    assert losses(runs / "lost") == undisturbed["megatron"]


def test_a_rank_on_a_node_that_slurm_gave_up_never_writes_again(
    cluster: Cluster, runs: Path
) -> None:
    """Split-brain: the node lives on, its rank wakes up when the next attempt has the folder."""
    run = runs / "split"
    job = submit_training(runs, "split", "--", "--checkpoint-lease-seconds", "12", ranks=1)
    old = freeze_at(run, f"{job}.0", 5)
    (node,) = _names(_attempts(run)[0]["node_list"])
    cluster.signal(node, signal.SIGSTOP, daemon_only=True)
    assert _wait_second_start(job).state == "COMPLETED", _said(run)
    first, second = _attempts(run)
    # Its srun ends with status 0 when Slurm takes the job away.
    assert first["reason"] == "ended by Slurm: a node was lost, or the job cancelled"
    assert second["reason"] == "finished"
    assert second["node_list"] != node
    written = _contents(run / "checkpoints")
    assert ranks_of(run) == old
    thaw(old)
    psutil.wait_procs([psutil.Process(pid) for pid in old], timeout=120)
    assert not ranks_of(run)
    assert _contents(run / "checkpoints") == written
    (log,) = (run / "logs" / f"{job}.0").glob("rank-*.log")
    said = [line for line in log.read_text().splitlines() if line.startswith(ERROR)]
    assert len(said) == 1, _said(run)
    assert f"{job}.1" in said[0]
    cluster.kill(node)
    cluster.boot(node)


def test_cancel_leaves_no_process(cluster: Cluster, runs: Path) -> None:
    job = submit_training(runs, "cancelled")
    thaw(freeze_at(runs / "cancelled", f"{job}.0", 1))
    assert f"job {job} is cancelled" in launch("cancel", "--runs", str(runs), "cancelled")
    assert wait_end(job).state == "CANCELLED"
    assert not processes_with(str(runs / "cancelled"))


def _end_soon(job: str) -> None:
    """Lower the time limit of a job that runs, so that it passes in one to two minutes."""
    begun = one(job).start
    assert begun is not None
    slurm_commands.update(job, TimeLimit=str(math.ceil((time.time() - begun) / 60) + 1))


def _wait_second_start(job: str) -> JobState:
    """Let a job that is requeued start at once, where Slurm would wait two minutes; its end."""
    again = wait_until(job, lambda state: state.restarts == 1 and state.state != "COMPLETING")
    if again.state == "PENDING":
        slurm_commands.update(job, StartTime="now+2")
    return wait_end(job)


def _attempts(run: Path) -> list[dict[str, Any]]:
    return manifest.attempts(run)


def _contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file of a folder: when it was last written, and its sum."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _names(node_list: str) -> list[str]:
    done = slurm_commands._run("scontrol", ["show", "hostnames", node_list], 10)
    return done.stdout.split()


def _said(run: Path) -> str:
    """What a run that failed said, and the ends of its attempts."""
    return f"{json.dumps(_attempts(run), indent=1)}\n{ends_of_logs(run)}"
