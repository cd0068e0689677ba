"""The launch command on a real Slurm, with programs that take no time."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.runs import run_manifest as manifest
from launch.runs import submission
from launch.slurm import commands as slurm_commands
from launch.slurm.state import job_states
from tests.slurm.cluster import Cluster, processes_with
from tests.slurm.conftest import Boot
from tests.slurm.jobs import submit as submit_script
from tests.slurm.jobs import wait_end, wait_state, wait_until
from tests.slurm.training import launch
from tests.unit.launch.hostile_text import CANARY, HOSTILE


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folder of runs, with a launch file of two tasks on one node."""
    (tmp_path / "site.yaml").write_text("tasks_per_node: 2\n")
    return tmp_path


def submit(runs: Path, *words: str) -> str:
    """Submit a program; returns the job's id."""
    said = launch("submit", "--runs", str(runs), "--launch", str(runs / "site.yaml"), *words)
    found = re.search(r"^job (\d+), log ", said, re.MULTILINE)
    assert found, said
    return found[1]


def test_a_program_gets_its_ranks_and_its_end_is_in_the_manifest(
    cluster: Cluster, runs: Path
) -> None:
    program = ["sh", "-c", "echo $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE"]
    job = submit(runs, "--name", "ranks", "--nodes", "2", "--", *program)
    assert wait_end(job).state == "COMPLETED"
    logs = sorted((runs / "ranks" / "logs" / f"{job}.0").glob("rank-*.log"))
    assert [log.read_text().strip() for log in logs] == [
        f"{rank} of 4, {rank % 2} of 2" for rank in range(4)
    ]
    launch("status", "--runs", str(runs))
    (attempt,) = json.loads((runs / "ranks" / "manifest.json").read_text())["attempts"]
    assert (attempt["status"], attempt["reason"]) == (0, "finished")
    assert attempt["node_list"] == "n[0-1]"


def test_a_chain_runs_in_order(cluster: Cluster, runs: Path) -> None:
    out, program = runs / "order", ["sh", "-c", 'sleep 1; echo "$1" >>"$2"', "sh"]
    jobs: list[str] = []
    for name in ("first", "second", "third"):
        after = [f"--dependency=afterok:{jobs[-1]}"] if jobs else []
        own = ["--name", name, "--tasks-per-node", "1", *after]
        jobs.append(submit(runs, *own, "--", *program, name, str(out)))
    assert [wait_end(job).state for job in jobs] == ["COMPLETED"] * 3
    assert out.read_text().split() == ["first", "second", "third"]


def test_after_a_failure_the_chain_is_removed(cluster: Cluster, runs: Path) -> None:
    first = submit(runs, "--name", "fails", "--", "sh", "-c", "sleep 1; exit 3")
    second = submit(runs, "--name", "never", f"--dependency=afterok:{first}", "--", "true")
    assert wait_end(first).state == "FAILED"
    assert wait_end(second).state == "CANCELLED"
    assert not list((runs / "never").glob("attempts/*"))


def test_status_says_in_one_line_why_a_job_does_not_start(cluster: Cluster, runs: Path) -> None:
    job = submit(runs, "--name", "late", "--sbatch", "begin=now+3600", "--", "true")
    wait_until(job, lambda state: state.reason == "BeginTime")
    lines = launch("status", "--runs", str(runs), "late").splitlines()
    assert f"job {job} PENDING" in lines[0]
    assert lines[1].startswith(f"{job} does not start: its start time has not come")
    launch("cancel", "--runs", str(runs), "late")
    assert wait_end(job).state == "CANCELLED"


@pytest.mark.parametrize("way", ["squeue --json", "scontrol"])
@pytest.mark.parametrize("array", [[], ["--array", "0-2"]], ids=["job", "array"])
def test_a_waiting_job_whose_launcher_died_is_found(
    cluster: Cluster, runs: Path, monkeypatch: pytest.MonkeyPatch, way: str, array: list[str]
) -> None:
    """The launcher ends between sbatch's answer and its note; nothing was written but its mark."""
    if way == "scontrol":
        monkeypatch.setattr(slurm_commands, "queue", lambda job_ids=(): None)
    name = "a $(b) 'c'"
    own = ["--runs", str(runs), "--launch", str(runs / "site.yaml"), "--name", name, *array]
    if not (launcher := os.fork()):
        submission.add_start = lambda folder, start: os._exit(9)
        main(["submit", *own, "--sbatch", "begin=now+3600", "--", "true"])
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]) == 9
    assert manifest.gather(runs / name).starts == []
    lines = launch("status", "--runs", str(runs)).splitlines()
    found = re.match(re.escape(name) + r": job (\d+)(_\[0-2\])? PENDING; 0 attempts", lines[0])
    assert found, lines
    launch("cancel", "--runs", str(runs), name)
    assert {state.state for state in job_states([found[1]])} == {"CANCELLED"}


def test_cancel_ends_every_process(cluster: Cluster, runs: Path) -> None:
    marker = str(runs / "no-such-file")
    command = ["sh", "-c", 'tail -F "$1" & setsid tail -F "$1" & wait', "sh", marker]
    job = submit(runs, "--name", "tails", "--nodes", "2", "--", *command)
    wait_until(job, lambda _: len(processes_with(marker)) >= 12)
    launch("cancel", "--runs", str(runs), job)
    assert wait_end(job).state == "CANCELLED"
    assert not processes_with(marker)


def test_hostile_names_and_arguments_are_data(cluster: Cluster, runs: Path) -> None:
    """Every text of the injection table at once, through sbatch, the script, srun and the rank."""
    texts = list(HOSTILE.values())
    name = f"a b'c\"d$(touch {CANARY})`touch {CANARY}`; ü"
    words = ["python3", "-c", "import sys, json; print(json.dumps(sys.argv[1:]))", *texts]
    job = submit(runs, "--name", name, "--tasks-per-node", "1", "--environment", f"A={texts[0]}",
                 "--", *words)  # fmt: skip
    assert wait_end(job).state == "COMPLETED"
    (log,) = (runs / name / "logs" / f"{job}.0").glob("rank-*.log")
    assert json.loads(log.read_text()) == texts
    assert not list(runs.rglob(CANARY))
    assert not Path(CANARY).exists()


def test_resume_waits_for_the_end_and_then_runs_the_same_script(
    cluster: Cluster, runs: Path
) -> None:
    gate = runs / "gate"
    program = ["sh", "-c", 'until [ -e "$1" ]; do sleep .1; done', "sh", str(gate)]
    job = submit(runs, "--name", "once", "--", *program)
    wait_state(job, "RUNNING")
    manifest.gather(runs / "once")
    assert main(["resume", "--runs", str(runs), "once"]) == 2
    gate.touch()
    assert wait_end(job).state == "COMPLETED"
    again = re.search(r"\d+", launch("resume", "--runs", str(runs), "once"))
    assert again
    assert wait_end(again[0]).state == "COMPLETED"
    assert len(manifest.gather(runs / "once").attempts) == 2


def test_slurm_accepts_1024_gpus_and_refuses_what_cannot_be(
    validation_cluster: Boot, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """configs/launch/slurm.yaml on 128 nodes with 8 GPUs each, of which only slurmctld runs."""
    own = ["submit", "--test-only", "--runs", str(runs), "--launch", "slurm", "--name", "large"]
    with validation_cluster(128).selected():
        assert "on nodes n[0-127]" in launch(*own, "--nodes", "128", "--", "true")
        assert main([*own, "--nodes", "129", "--", "true"]) == 2
        assert slurm_commands.queue(["1"]) == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "sinfo" in said
    assert not (runs / "large").exists()


def test_a_job_submitted_from_inside_an_array_is_its_own(cluster: Cluster, runs: Path) -> None:
    """From a step of a running element: a failure, a requeue and a cancel touch the new job alone.

    The outer job's task count, memory per CPU and binding would also keep it from starting.
    """
    inner = runs / "inner"
    fails = f"env -0 >{runs}/$SLURM_JOB_ID.$RANK; [ -e {runs}/again ] && sleep 600; exit 9"
    words = [sys.executable, "-m", "launch", "submit", "--runs", str(runs), "--name", "inner"]
    words += ["--launch", str(runs / "site.yaml"), "--requeue", "--", "sh", "-c", fails]
    body = f"""
if [ "$SLURM_ARRAY_TASK_ID" = 1 ]; then
  cd {Path(__file__).parents[2]}
  srun --nodes=1 --ntasks=1 {shlex.join(words)} >{runs}/said 2>&1
fi
sleep 600"""
    options = ["--array=1-2", "--ntasks=3", "--mem-per-cpu=100", "--nodes=1"]
    outer = submit_script(runs, body, *options)
    try:
        wait_state(f"{outer}_1", "RUNNING")
        wait_state(f"{outer}_2", "RUNNING")
        wait_until(f"{outer}_1", lambda _: "job " in _text(runs / "said"))
        found = re.search(r"job (\d+), log ", _text(runs / "said"))
        assert found, _text(runs / "said")
        job = found[1]
        wait_until(job, lambda state: (state.state, state.restarts) == ("PENDING", 1))
        (runs / "again").touch()
        slurm_commands.update(job, StartTime="now+2")
        wait_until(job, lambda _: f"{job}.1" in _attempts(inner))
        wait_state(job, "RUNNING")
        assert f"job {job} is cancelled" in launch("cancel", "--runs", str(runs), "inner")
        assert wait_end(job).state == "CANCELLED"
        assert _attempts(inner) == [f"{job}.0", f"{job}.1"]
        seen = dict(p.partition("=")[::2] for p in _text(runs / f"{job}.0").split("\0"))
        assert seen["WORLD_SIZE"] == "2"
        assert not [name for name in seen if name.startswith("SLURM_ARRAY_")]
        assert "SLURM_MEM_PER_CPU" not in seen
        around = {state.array_task: state for state in job_states([outer])}
        assert {task: (s.state, s.restarts) for task, s in around.items()} == {
            "1": ("RUNNING", 0), "2": ("RUNNING", 0),
        }  # fmt: skip
    finally:
        slurm_commands.cancel(outer)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _attempts(run: Path) -> list[str]:
    return [attempt["attempt"] for attempt in manifest.attempts(run)]


def test_requests_as_sbatch_takes_them(cluster: Cluster, runs: Path) -> None:
    """A type of GPU, no time limit, sizes in small letters, an environment of the job's own."""
    (runs / "typed.yaml").write_text(
        "gpus_per_node: h100:2\ntime_limit: 0\nmemory: 64gb\nexclusive: user\n"
        "rendezvous_suffix: .localdomain\nsbatch: {export: NONE, cpus-per-gpu: 3, nice: 1}\n"
    )
    says = 'echo "$RANK of $WORLD_SIZE sees $CUDA_VISIBLE_DEVICES at $MASTER_ADDR"'
    own = ["--launch", str(runs / "typed.yaml"), "--name", "typed"]
    job = submit(runs, *own, "--", "sh", "-c", says)
    assert wait_end(job).state == "COMPLETED", _text(runs / f"typed/logs/{job}.log")
    logs = sorted((runs / "typed/logs" / f"{job}.0").glob("rank-*.log"))
    nodes = manifest.attempts(runs / "typed")[0]["node_list"]
    assert [log.read_text() for log in logs] == [
        f"{rank} of 2 sees 0,1 at {nodes}.localdomain\n" for rank in range(2)
    ]
    assert job_states([job])[0].time_limit_minutes is None
