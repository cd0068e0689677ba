"""The batch script: as it was reviewed (snapshots), as bash and sbatch read it, as it runs."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm.script import _environment, sbatch_script
from launch.spec.launch_spec import LaunchSpec
from tests.unit.launch.fake_slurm import FakeSlurm, sbatch_words
from tests.unit.launch.launch_cases import SNAPSHOTS, SPECS, job


@pytest.mark.parametrize("name", SPECS)
def test_the_script_is_the_reviewed_one(name):
    assert sbatch_script(SPECS[name]()) == (SNAPSHOTS / f"{name}.sbatch").read_text("utf-8")


@pytest.mark.parametrize("name", SPECS)
def test_bash_accepts_the_script(name):
    done = subprocess.run(
        ["bash", "-n", str(SNAPSHOTS / f"{name}.sbatch")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_snapshot_has_a_job():
    assert {path.stem for path in SNAPSHOTS.iterdir()} == set(SPECS)


def test_sbatch_reads_the_options_that_the_spec_names():
    words = sbatch_words(sbatch_script(SPECS["pyxis-16-nodes"]()))
    for word in (
        "--nodes=17", "--ntasks-per-node=8", "--gpus-per-node=8", "--mem=0", "--account=physics",
        "--constraint=h100&ib", "--reservation=maintenance test", "--exclusive", "--contiguous",
        "--signal=B:USR1@600", "--requeue", "--comment=first light", "--mail-type=END,FAIL",
    ):  # fmt: skip
        assert word in words
    assert not [word for word in words if not word.startswith("--")]


def test_the_template_cannot_print_an_unquoted_value():
    with pytest.raises(TypeError, match="without a quoting filter"):
        _environment().from_string("{{ value }}").render(value="x; rm -rf /")


def test_a_job_that_may_not_requeue_says_so_whatever_the_site_prefers():
    assert "--no-requeue" in sbatch_words(sbatch_script(job()))


def test_a_dependency_that_failed_removes_the_job():
    words = sbatch_words(sbatch_script(job(dependency="afterok:5")))
    assert "--kill-on-invalid-dep=yes" in words


def _run(tmp_path: Path, spec: LaunchSpec, rank: str, scontrol: str = "", squeue: str = "true"):
    """Run a job whose ranks run some bash, in a run folder under tmp_path."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    slurm = FakeSlurm(
        folder,
        scontrol=f'case "$1" in show) echo n0; echo n1;; *) {scontrol or "true"};; esac',
        squeue=squeue,
    )
    own = replace(
        spec, command=("bash", "-c", rank), workdir=str(tmp_path), folder=str(tmp_path / "run"),
        virtual_environment=None, environment={},
    )  # fmt: skip
    return slurm, slurm.run(sbatch_script(own))


def _end(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run/attempts/70000.0.end.json").read_text())


def test_a_rank_gets_what_torch_distributed_reads(tmp_path):
    names = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"
    _, done = _run(tmp_path, job(), f"echo {names}")
    # Rank 1 of 2 of job 70000, whose first node is n0.
    assert f"1 1 2 2 n0 {15000 + 70000 % 15000}\n" in done.stdout


@pytest.mark.parametrize(
    ("fields", "address"),
    [
        ({"rendezvous_suffix": "-ib"}, "n0-ib"),
        ({"rendezvous_suffix": ".hsn.x"}, "n0.hsn.x"),
        ({"environment": {"MASTER_ADDR": "jwb0001i"}}, "jwb0001i"),
    ],
)
def test_ranks_meet_in_the_network_that_the_user_names(tmp_path, fields, address):
    (tmp_path / "slurm").mkdir()
    slurm = FakeSlurm(tmp_path / "slurm")
    own = {"workdir": str(tmp_path), "folder": str(tmp_path / "run")}
    own |= {"command": ("bash", "-c", "echo at $MASTER_ADDR:$MASTER_PORT")}
    done = slurm.run(sbatch_script(job(**own, **fields)))
    assert f"at {address}:{15000 + 70000 % 15000}\n" in done.stdout, done.stderr


@pytest.mark.parametrize("wanted", [True, False])
def test_the_nodes_are_written_as_deepspeed_reads_them(tmp_path, wanted):
    spec = job(hostfile=wanted, nodes=2, tasks_per_node=4)
    _, done = _run(tmp_path, spec, "cat run/hostfile || echo none")
    said = "n0 slots=4\nn1 slots=4\n" if wanted else "none\n"
    assert done.stdout.startswith(said), done.stderr


def test_a_port_of_the_user_s_wins(tmp_path):
    (tmp_path / "slurm").mkdir()
    slurm = FakeSlurm(tmp_path / "slurm")
    own = {"workdir": str(tmp_path), "folder": str(tmp_path / "run")}
    own |= {"command": ("bash", "-c", "echo $MASTER_ADDR:$MASTER_PORT")}
    done = slurm.run(sbatch_script(job(**own, environment={"MASTER_PORT": "29500"})))
    assert "n0:29500\n" in done.stdout, done.stderr


def test_the_cores_of_a_task_reach_srun(tmp_path):
    slurm, _ = _run(tmp_path, job(cpus_per_task=3), "true")
    assert "--cpus-per-task=3" in slurm.words("srun")


def test_an_attempt_leaves_its_record(tmp_path):
    _, done = _run(tmp_path, job(), "exit 7")
    assert done.returncode == 7
    start = json.loads((tmp_path / "run/attempts/70000.0.start.json").read_text())
    assert (start["job_id"], start["attempt"], start["node_list"]) == ("70000", "70000.0", "n[0-1]")
    end = _end(tmp_path)
    assert (end["status"], end["reason"]) == (7, "failed with status 7")
    assert end["end"] >= start["start"] > 1.7e9


def test_an_element_of_an_array_is_named_as_slurm_names_it(tmp_path):
    (tmp_path / "slurm").mkdir()
    slurm = FakeSlurm(tmp_path / "slurm")
    spec = job(array="0-2", workdir=str(tmp_path), folder=str(tmp_path / "run"))
    done = slurm.run(sbatch_script(spec), SLURM_ARRAY_JOB_ID="69", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 0, done.stderr
    start = json.loads((tmp_path / "run/attempts/69_2.0.start.json").read_text())
    assert start["job_id"] == "69_2"


GPU_PROGRAMS = {
    # The second of the devices that the job was given, as nvidia-smi prints its address.
    "nvidia-smi": '[ "$1" = --id=5 ] && echo 00000000:3B:00.0',
    "cat": """case "$1" in
/sys/bus/pci/devices/0000:3b:00.0/numa_node) echo 1;;
/sys/devices/system/node/node1/cpulist) echo 8-15;;
*) exec /bin/cat "$@";;
esac""",
    "numactl": """[ "$1" = --cpunodebind=1 ] && [ "$2" = --preferred=1 ] && export BOUND=numactl
shift 2; exec "$@\"""",
    "taskset": '[ "$2" = 8-15 ] && export BOUND=taskset; shift 2; exec "$@"',
}


@pytest.mark.parametrize(
    ("broken", "bound"),
    [
        ((), "numactl"),
        (("numactl",), "taskset"),
        (("numactl", "taskset"), "nothing"),
        (("nvidia-smi",), "nothing"),
    ],
)
def test_a_rank_is_bound_to_the_numa_node_of_its_gpu(tmp_path, broken, bound):
    (tmp_path / "slurm").mkdir()
    slurm = FakeSlurm(tmp_path / "slurm", **{**GPU_PROGRAMS, **dict.fromkeys(broken, "exit 1")})
    spec = job(
        gpus_per_node=2, workdir=str(tmp_path), folder=str(tmp_path / "run"),
        command=("bash", "-c", 'echo "bound by ${BOUND:-nothing}"'),
    )  # fmt: skip
    done = slurm.run(sbatch_script(spec), CUDA_VISIBLE_DEVICES="4,5")
    assert f"bound by {bound}\n" in done.stdout, done.stderr


SAVE = "mkdir -p run/checkpoints; echo {} > run/checkpoints/latest_checkpointed_iteration.txt"


def _stopped(tmp_path: Path, saved: str, spec: LaunchSpec):
    """A job that gets USR1 in its batch shell and whose rank then saves, or not, and exits 75."""
    # srun was replaced by bash, which is what the script signals; its parent is the batch shell.
    rank = (
        f"trap '{saved}; exit 75' USR1; kill -USR1 $PPID; "
        "for i in $(seq 100); do sleep 0.1; done; exit 1"
    )
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("5")
    return _run(tmp_path, spec, rank, scontrol='echo "asked: $*"')[1]


REQUEUED = {"saves_checkpoints": True, "requeue": True, "signal_lead_seconds": 60}


def test_a_stop_before_the_time_limit_requeues_what_got_further(tmp_path):
    done = _stopped(tmp_path, SAVE.format(6), job(**REQUEUED))
    assert "asked: requeue 70000" in done.stdout, done.stderr
    assert _end(tmp_path)["reason"] == "requeued after a checkpoint"
    assert done.returncode == 75


def test_a_stop_without_progress_is_not_requeued(tmp_path):
    done = _stopped(tmp_path, SAVE.format(5), job(**REQUEUED))
    assert "asked: requeue" not in done.stdout
    assert _end(tmp_path)["reason"] == "not requeued: no step was saved since step 5"


def test_without_requeue_a_stop_is_a_stop(tmp_path):
    done = _stopped(tmp_path, SAVE.format(6), job(**{**REQUEUED, "requeue": False}))
    assert "asked: requeue" not in done.stdout
    assert _end(tmp_path)["reason"] == "stopped after a checkpoint"


def test_a_stop_that_nobody_announced_is_not_requeued(tmp_path):
    """As when the user cancels the job: Slurm ends the ranks, and the batch shell gets nothing."""
    _, done = _run(tmp_path, job(**REQUEUED), f"{SAVE.format(6)}; exit 75", 'echo "asked: $*"')
    assert "asked: requeue" not in done.stdout
    assert _end(tmp_path)["reason"] == "stopped after a checkpoint"


def test_requeueing_has_an_end(tmp_path):
    spec = job(**REQUEUED, max_requeues=2)
    folder = tmp_path / "slurm"
    folder.mkdir()
    slurm = FakeSlurm(folder, scontrol='case "$1" in show) echo n0;; *) echo "asked: $*";; esac')
    rank = "trap 'echo 9 > run/checkpoints/latest_checkpointed_iteration.txt; exit 75' USR1; "
    rank += "kill -USR1 $PPID; for i in $(seq 100); do sleep 0.1; done"
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    own = replace(
        spec, command=("bash", "-c", rank), workdir=str(tmp_path), folder=str(tmp_path / "run")
    )
    for restarts, asked in ((1, True), (2, False)):
        (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("5")
        done = slurm.run(sbatch_script(own), SLURM_RESTART_COUNT=str(restarts))
        assert ("asked: requeue" in done.stdout) is asked, done.stdout + done.stderr


@pytest.mark.parametrize("other", ["still running", "ended"])
def test_a_second_job_of_a_run_that_runs_is_refused(tmp_path, other):
    attempts = tmp_path / "run/attempts"
    attempts.mkdir(parents=True)
    (attempts / "600.1.start.json").write_text("{}")
    if other == "ended":
        (attempts / "600.1.end.json").write_text("{}")
    spec = job(saves_checkpoints=True)
    asked = '[[ "$*" == *--jobs=600* ]] && echo "600 main RUNNING"'
    _, done = _run(tmp_path, spec, "echo ran", squeue=asked)
    if other == "ended":
        assert "ran" in done.stdout
    else:
        assert done.returncode == 2
        assert "ran\n" not in done.stdout
        assert done.stderr.count("\n") == 1
        assert "job 600 is running" in done.stderr
