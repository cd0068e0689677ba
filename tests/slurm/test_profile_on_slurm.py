"""submit --profile on a real Slurm: two sizes, and the report after both."""

import json
import re
from pathlib import Path

import pytest

from launch.runs.run_manifest import gather
from tests.slurm.conftest import Boot
from tests.slurm.jobs import wait_end
from tests.slurm.training import launch
from tests.training_cases import MOCK

pytestmark = pytest.mark.slow

CONFIG = "configs/demo-mone.yaml"


def test_two_sizes_end_in_one_report_with_a_scaling_curve(
    slurm_cluster: Boot, tmp_path: Path
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("tasks_per_node: 1\ncpus_per_task: 1\n")
    own = ["--runs", str(tmp_path), "--name", "scale", "--launch", str(site), "--nodes", "2"]
    own += ["--profile", "--profile-steps", "2", "--against", "moe"]
    batch = ["--micro-batch-size", "2", "--global-batch-size", "8", "--expert-model-parallel-size"]
    flags = [*MOCK, *batch, "1", "--windows", "1", "--warm-up", "1", "--no-memory"]
    with slurm_cluster(4).selected():
        said = launch("submit", "--config", CONFIG, *own, "--", *flags)
        jobs = re.findall(r"^job (\d+),", said, re.MULTILINE)
        assert len(jobs) == 3, said
        ends = [wait_end(job) for job in jobs]
        log = (tmp_path / "scale" / "logs" / f"{jobs[2]}.log").read_text()
        assert [end.state for end in ends] == ["COMPLETED"] * 3, log
    assert ends[2].start is not None
    assert all(end.end is not None and end.end <= ends[2].start for end in ends[:2])
    _check_results(tmp_path / "scale")


def _check_results(run: Path) -> None:
    profiles = [
        json.loads((run / "profiles" / f"00{nodes}-nodes" / "profile.json").read_text())
        for nodes in (1, 2)
    ]
    assert [one["ranks"]["world_size"] for one in profiles] == [1, 2]
    # Weak scaling: a rank has the same micro-batches at both sizes.
    assert [one["config"]["micro_batches"] for one in profiles] == [2, 2]
    assert all([r["name"] for r in one["runs"]] == ["mone", "moe"] for one in profiles)
    page = (run / "profiles" / "report" / "report.html").read_text()
    assert "Weak scaling: the same tokens a rank at every size." in page
    assert (run / "profiles" / "report" / "plots" / "scaling.png").stat().st_size > 0
    attempts = gather(run).attempts
    assert sorted(attempt.get("case", "") for attempt in attempts) == ["", "001-nodes", "002-nodes"]
    assert [attempt["status"] for attempt in attempts] == [0, 0, 0]
    assert not list(run.rglob("latest_checkpointed_iteration.txt"))
