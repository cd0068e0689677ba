"""The pre-flight as 128 tasks on 16 nodes of a real Slurm: one bad GPU, one node left out."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from launch.preflight.lines import read_lines, task_lines
from launch.preflight.place import meeting_port
from tests.slurm.cluster import _is_free
from tests.slurm.conftest import Boot
from tests.slurm.jobs import submit, wait_end
from tests.unit.launch_preflight import fake_smi

NODES, TASKS = 16, 8
# One process a node measures, over gloo: here are neither GPUs nor memory for 128 of them.
LIMITS = "backend=gloo megabytes=1 relative=0 seconds=90"
JOB = """
export PATH={programs}:$PATH PYTHONPATH={root} OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
export MASTER_PORT={port}
mkdir preflight
scontrol show hostnames "$SLURM_JOB_NODELIST" >preflight/a.hosts
read -r -d '' start_rank <<'RANK' || true
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
exec "$@"
RANK
srun --export=ALL --output=preflight/a.jsonl --error=preflight/a.err \\
  bash -c "$start_rank" rank {python} -m launch.preflight check \\
  --hosts preflight/a.hosts --limit {limits}
status=0
{python} -m launch.preflight judge preflight/a.jsonl --hosts preflight/a.hosts \\
  --need {need} --limit {limits} || status=$?
exit $status
"""


def free_master_port() -> int:
    """One for which all meeting ports are free here, where all nodes have one address."""
    for port in range(15000 + os.getpid() % 10000, 30000):
        wanted = {
            meeting_port(port, node, distance) for node in range(NODES) for distance in (1, 2)
        }
        if all(_is_free(number) for number in wanted):
            return port
    raise AssertionError("no MASTER_PORT has free meeting ports")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with an nvidia-smi, to which GPU 5 of n3 has uncorrected errors of memory."""
    folder = fake_smi.install(tmp_path / "smi", fake_smi.gpus(TASKS))
    errors = {"ecc.errors.uncorrected.volatile.total": "12"}
    fake_smi.write_table(tmp_path / "smi", "gpu.n3", fake_smi.gpus(TASKS, gpu5=errors))
    return folder


def test_the_one_bad_node_of_sixteen_is_left_out(
    slurm_cluster: Boot, tmp_path: Path, programs: Path
) -> None:
    body = JOB.format(
        programs=shlex.quote(str(programs)),
        root=shlex.quote(str(Path(__file__).parents[2])),
        python=shlex.quote(sys.executable),
        port=free_master_port(),
        limits=LIMITS,
        need=NODES - 1,
    )
    shape = (f"--nodes={NODES}", f"--ntasks-per-node={TASKS}", f"--gpus-per-node={TASKS}")
    with slurm_cluster(NODES).selected():
        job_id = submit(tmp_path, body, *shape)
        done = wait_end(job_id)
    said = (tmp_path / f"{job_id}.out").read_text()
    assert (done.state, done.exit_code) == ("COMPLETED", 0), said
    assert "megatron-mone: node n3 is left out: GPU 5 has 12 uncorrected ECC errors\n" in said
    assert said.count("is left out") == 1
    assert "pre-flight: 15 of 16 nodes are good, bad: n3; all-reduce between two nodes " in said
    folder = tmp_path / "preflight"
    good = [f"n{node}" for node in range(NODES) if node != 3]
    assert (folder / "a.nodes").read_text().split() == good
    assert (folder / "a.bad").read_text() == "n3\n"

    hosts = (folder / "a.hosts").read_text().split()
    lines = task_lines(read_lines(folder / "a.jsonl"), hosts)
    assert len(lines) == NODES * TASKS  # srun has mixed no two of them
    result = json.loads((folder / "a.json").read_text())
    met = {tuple(pair["nodes"]) for pair in result["pair_gb_per_s"]}
    assert met == {
        (hosts[i], hosts[i + distance]) for distance in (1, 2) for i in range(NODES - distance)
    }
    assert not list(folder.glob(".check-*"))
