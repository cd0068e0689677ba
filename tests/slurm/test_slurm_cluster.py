"""The test clusters themselves: they leave nothing behind, and say why they cannot be had."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import cluster as cluster_module
from tests.slurm.cluster import Cluster, processes_with, why_unavailable

BOOT_AND_WAIT = """
import time
from tests.slurm.cluster import Cluster
cluster = Cluster(2, 1)
cluster.start()
print(cluster.folder, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def needs_slurm() -> None:
    if reason := why_unavailable():
        pytest.skip(reason)


def test_stop_ends_every_process_and_removes_the_folder() -> None:
    cluster = Cluster(2, 1)
    try:
        cluster.start()
        # For each of munged, slurmctld and two slurmd: its box, the shell in it and itself.
        assert len(processes_with(str(cluster.folder))) >= 12
    finally:
        cluster.stop()
    assert not processes_with(str(cluster.folder))
    assert not cluster.folder.exists()


def test_tests_that_are_killed_leave_no_process() -> None:
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", BOOT_AND_WAIT], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert child.stdout
    folder = child.stdout.readline().strip()
    try:
        assert len(processes_with(folder)) >= 12
    finally:
        child.kill()
        child.wait()
    deadline = time.monotonic() + 120
    while (left := processes_with(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    # Its folder stays: nobody was left to remove it.
    shutil.rmtree(folder)
    assert not left


def test_without_slurm_the_reason_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster_module, "SEARCH_PATH", str(tmp_path))
    reason = why_unavailable.__wrapped__()
    assert reason.startswith("Slurm is not installed (sbatch, srun, slurmctld, ")
    assert ".ci/slurm.sh" in reason


def test_where_namespaces_are_forbidden_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ["bash", "-c", "echo unshare: Operation not permitted >&2; exit 1"]
    monkeypatch.setattr(cluster_module, "UNSHARE", refused)
    reason = why_unavailable.__wrapped__()
    assert reason.endswith("(unshare: Operation not permitted)")
    assert "namespaces" in reason
