"""How a job's script ends and starts again, on a real Slurm with plain programs as ranks.

All jobs are submitted at once, for most of the time is Slurm's own waiting.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.runs.run_manifest import attempts
from launch.slurm import commands as slurm_commands
from launch.slurm.records import JobState
from launch.slurm.script import sbatch_script
from launch.spec.checks import checked
from launch.spec.launch_spec import LaunchSpec
from tests.slurm.cluster import Cluster, processes_with
from tests.slurm.conftest import Boot
from tests.slurm.jobs import wait_end, wait_state, wait_until

# The contract of launch.preflight without its checks: nodes named in $BAD/bad are bad, "first" is
# the first of the job.
STAND_IN = """
import os, sys
from pathlib import Path
command, *words = sys.argv[3:]
hosts = Path(words[words.index("--hosts") + 1]).read_text().split()
if command == "check":
    print(os.environ["SLURMD_NODENAME"], os.environ["WORLD_SIZE"])
    raise SystemExit
answers = Path(words[0])
seen = [line.split()[0] for line in answers.read_text().splitlines()]
named = Path(os.environ["BAD"], "bad").read_text().replace("first", hosts[0]).split()
good = [host for host in hosts if host in seen and host not in named]
bad = [host for host in hosts if host not in good]
need = int(words[words.index("--need") + 1])
for name, nodes in (("nodes", good[:need]), ("bad", bad)):
    answers.with_suffix(f".{name}").write_text("".join(f"{node}\\n" for node in nodes))
for host in bad:
    print(f"megatron-mone: node {host} is left out: it is named", file=sys.stderr)
raise SystemExit(69 if len(good) < need else 0)
"""
# The real one, which on n1 wants more disk than there is.
CHECKED = f"""#!/bin/bash
[ "$SLURMD_NODENAME$3" != n1check ] || set -- "$@" --limit tmp_disk_gib=999999
PYTHONPATH={Path(__file__).parents[2]} OMP_NUM_THREADS=1 exec {sys.executable} "$@"
"""
WHERE = 'echo "$SLURMD_NODENAME $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR"'


@dataclass(frozen=True)
class Run:
    """A submitted job and its run folder."""

    job_id: str
    folder: Path

    def attempts(self) -> list[dict[str, Any]]:
        """As the manifest lists them."""
        return attempts(self.folder)

    def logs(self, restarts: int) -> list[str]:
        """What each rank of an attempt wrote."""
        folder = self.folder / "logs" / f"{self.job_id}.{restarts}"
        return [path.read_text() for path in sorted(folder.glob("rank-*.log"))]

    def requeued(self) -> JobState:
        """The job's state once it waits for its next start."""
        return wait_until(self.job_id, lambda job: job.state == "PENDING" and job.restarts > 0)

    def start_again(self) -> None:
        """End the wait for the next start."""
        slurm_commands.update(self.job_id, StartTime="now+2")


def _submit(place: Path, rank: str, *, bad: str = "", python: str = "", **fields: Any) -> Run:
    """Submit ranks that run some bash, in folders of `place`; their pre-flight is `python`, or a
    stand-in that finds the nodes `bad`."""
    folder = place / "run"
    (folder / "logs").mkdir(parents=True)
    program = place / "venv/bin/python"
    program.parent.mkdir(parents=True)
    (place / "bad").write_text(bad)
    (place / "stand_in.py").write_text(STAND_IN)
    stand_in = f'#!/bin/bash\nexec {sys.executable} -S {place}/stand_in.py "$@"\n'
    program.write_text(python or stand_in)
    program.chmod(0o755)
    spec = LaunchSpec(
        name=place.name,
        command=("bash", "-c", rank),
        workdir=str(place),
        folder=str(folder),
        virtual_environment=str(place / "venv"),
        environment={"BAD": str(place)},
        **fields,
    )
    script = place / "job.sbatch"
    script.write_text(sbatch_script(checked(spec)))
    return Run(slurm_commands.submit(script), folder)


FAIL_ONCE = '[ "${MEGATRON_MONE_ATTEMPT##*.}" != 0 ]'
HANG_ONCE = "trap 'echo stacks' USR2; echo up; "
HANG_ONCE += 'until [ "${MEGATRON_MONE_ATTEMPT##*.}" != 0 ]; do sleep .2; done; '
HANG_ONCE += (
    'for _ in {1..40}; do [ $RANK != 0 ] || touch "$MEGATRON_MONE_PROGRESS"; sleep .2; done'
)
WAIT = "while [ ! -e gate ]; do sleep .2; done"


@pytest.fixture(scope="module")
def cluster(slurm_cluster: Boot) -> Iterator[Cluster]:
    with slurm_cluster(4).selected() as selected:
        yield selected


@pytest.fixture(scope="module")
def lost(slurm_cluster: Boot, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cluster, Run]:
    """A job on two of three nodes, of which one lost its power, on a cluster of its own."""
    cluster = slurm_cluster(3, owner="requeue")
    with cluster.selected():
        place = tmp_path_factory.mktemp("lost")
        run = _submit(place, f"{FAIL_ONCE} || sleep 600", nodes=2, requeue=True, hang_seconds=600)
        assert wait_state(run.job_id, "RUNNING").nodes == "n[0-1]"
        wait_until(run.job_id, lambda _: len(run.logs(0)) == 2)
        cluster.kill("n1")
    return cluster, run


@pytest.fixture(scope="module")
def runs(
    cluster: Cluster, lost: tuple[Cluster, Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """All jobs of this file but the one that lost a node."""
    folder = tmp_path_factory.mktemp("runs")
    again: dict[str, Any] = {"requeue": True, "backoff_seconds": 600}
    jobs: dict[str, dict[str, Any]] = {
        "fails once": {"rank": FAIL_ONCE, **again},
        "fails": {"rank": "exit 9", "requeue": True, "max_failures": 2, "saves_checkpoints": True},
        "hangs once": {"rank": HANG_ONCE, "nodes": 2, "hang_seconds": 5, **again},
        "array": {"rank": f"[ $SLURM_ARRAY_TASK_ID = 0 ] && {WAIT}", "array": "0-1", **again},
        "cancelled": {"rank": "sleep 600", "nodes": 2, **again},
        "one bad": {
            "rank": WHERE, "bad": "n1", "nodes": 3, "tasks_per_node": 2, "spare_nodes": 1,
            "preflight": True,
        },
        "really bad": {
            "rank": WHERE, "python": CHECKED, "nodes": 2, "tasks_per_node": 2, "spare_nodes": 1,
            "preflight": True, "preflight_limits": {"megabytes": "1", "relative": "0"},
            "sbatch": {"exclude": "n3"},
        },
        "too few": {
            "rank": WHERE, "bad": "first", "nodes": 2, "preflight": True, **again,
            "sbatch": {"exclude": "n3"},
        },
    }  # fmt: skip
    return {name: _submit(folder / name.replace(" ", "-"), **job) for name, job in jobs.items()}


def _ended(run: Run) -> list[tuple[int, str]]:
    return [(attempt["status"], attempt["reason"]) for attempt in run.attempts()]


def test_a_failed_job_starts_again_after_the_back_off(runs: dict[str, Run]) -> None:
    run = runs["fails once"]
    waiting = run.requeued()
    (first,) = run.attempts()
    assert (first["status"], first["reason"]) == (1, "failed with status 1; requeued")
    assert waiting.start is not None
    assert 600 <= waiting.start - first["end"] < 700
    run.start_again()
    assert wait_end(run.job_id).state == "COMPLETED"
    assert _ended(run)[1:] == [(0, "finished")]


def test_a_job_that_fails_again_and_again_gives_up(runs: dict[str, Run]) -> None:
    run = runs["fails"]
    waiting = run.requeued()
    # A back-off of 60 s is no more than Slurm waits by itself.
    assert waiting.start is not None
    assert waiting.start - run.attempts()[0]["end"] >= 120
    run.start_again()
    assert wait_end(run.job_id).state == "FAILED"
    gave_up = "failed with status 9; gave up: failed 2 times since step none"
    assert _ended(run) == [(9, "failed with status 9; requeued"), (9, gave_up)]


def test_an_element_of_an_array_starts_again_alone(runs: dict[str, Run]) -> None:
    """The job number of the last element is that of the whole array."""
    run = runs["array"]
    wait_until(f"{run.job_id}_1", lambda job: job.state == "PENDING" and job.restarts == 1)
    other = wait_state(f"{run.job_id}_0", "RUNNING")
    assert other.restarts == 0
    (run.folder.parent / "gate").touch()
    assert wait_end(other.label).state == "COMPLETED"
    slurm_commands.cancel(run.job_id)


def test_a_cancelled_job_does_not_come_back(runs: dict[str, Run]) -> None:
    """Its ranks fail, of a signal; Slurm would requeue a job that was cancelled."""
    run = runs["cancelled"]
    wait_until(run.job_id, lambda _: len(run.logs(0)) == 2)
    slurm_commands.cancel(run.job_id)
    ended = wait_end(run.job_id)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)


def test_hung_ranks_show_their_stacks_and_are_ended(runs: dict[str, Run]) -> None:
    run = runs["hangs once"]
    run.requeued()
    assert _ended(run) == [(124, "hung: no progress for 5 s; requeued")]
    assert [log.startswith("up\n") and "stacks\n" in log for log in run.logs(0)] == [True, True]
    assert not processes_with(f"{run.folder}/attempts/{run.job_id}.0.progress")
    run.start_again()  # this time rank 0 says that it gets on, for longer than five seconds
    assert wait_end(run.job_id).state == "COMPLETED"
    assert _ended(run)[1:] == [(0, "finished")]
    assert run.logs(1) == ["up\n"] * 2


def test_a_bad_node_is_left_out_for_a_spare_one(runs: dict[str, Run]) -> None:
    run = runs["one bad"]
    done = wait_end(run.job_id)
    assert done.state == "COMPLETED"
    said = Path(done.stdout).read_text()
    assert "node n1 is left out" in said
    nodes = [node for node in ("n0", "n2", "n3") for _ in range(2)]
    assert run.logs(0) == [f"{node} {rank} {rank % 2} 6 n0\n" for rank, node in enumerate(nodes)]
    (attempt,) = run.attempts()
    assert (attempt["node_list"], attempt["left_out"]) == ("n[0-3]", "n1")
    answers = (run.folder / f"preflight/{run.job_id}.0.jsonl").read_text().splitlines()
    assert sorted(answers) == sorted(["n0 8", "n1 8", "n2 8", "n3 8"] * 2)


def test_a_bad_node_is_found_by_the_real_pre_flight(runs: dict[str, Run]) -> None:
    run = runs["really bad"]
    done = wait_end(run.job_id)
    said = Path(done.stdout).read_text()
    assert done.state == "COMPLETED", said
    assert "node n1 is left out: " in said
    assert [log.split()[0] for log in run.logs(0)] == ["n0", "n0", "n2", "n2"]
    assert run.attempts()[0]["left_out"] == "n1"


def test_with_too_few_good_nodes_the_job_starts_again_on_others(runs: dict[str, Run]) -> None:
    run = runs["too few"]
    waiting = run.requeued()
    bad = (run.folder / "preflight/excluded").read_text().strip()
    assert _ended(run) == [(69, f"pre-flight: {bad} is bad, 1 of 2 nodes left; requeued")]
    asked = ["--noheader", "--format=%x", f"--jobs={waiting.job_id}"]
    said = slurm_commands._run("squeue", asked, 10).stdout.strip()
    shown = slurm_commands._run("scontrol", ["show", "hostnames", said], 10).stdout.split()
    assert sorted(shown) == sorted([bad, "n3"])  # n3 is the user's
    (run.folder.parent / "bad").write_text(bad)
    run.start_again()
    assert wait_end(run.job_id).state == "COMPLETED"
    others = [node for node in ("n0", "n1", "n2") if node != bad]
    assert run.logs(1) == [f"{node} {r} 0 2 {others[0]}\n" for r, node in enumerate(others)]


def test_a_job_that_lost_a_node_starts_again(
    runs: dict[str, Run], lost: tuple[Cluster, Run]
) -> None:
    cluster, run = lost
    with cluster.selected():
        run.requeued()
        run.start_again()
        assert wait_end(run.job_id).state == "COMPLETED"
    first, second = run.attempts()
    # One that is lost has no end, unless its script had time to say why before Slurm killed it.
    assert first["end"] is None or first["reason"].startswith("ended by Slurm: a node was lost")
    assert (second["status"], second["node_list"]) == (0, "n[0,2]")
