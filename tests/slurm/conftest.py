"""Fixtures: Slurm clusters on loopback, booted once a session for each size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_unavailable
from tests.slurm.jobs import submit, wait_state, wait_until

Boot = Callable[..., Cluster]


def _clusters(*, real: bool) -> Iterator[Boot]:
    if reason := why_unavailable():
        pytest.skip(reason)
    booted: dict[tuple[int, int, str], Cluster] = {}

    def boot(nodes: int, gpus_per_node: int = 8, owner: str = "") -> Cluster:
        key = (nodes, gpus_per_node, owner)
        if key not in booted:
            # Kept before it is started: a cluster that half booted is stopped too.
            booted[key] = Cluster(nodes, gpus_per_node, real=real)
            booted[key].start()
        return booted[key]

    try:
        yield boot
    finally:
        for cluster in booted.values():
            cluster.stop()


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Boot]:
    """`slurm_cluster(nodes, gpus_per_node=8)`: a running cluster of that size.

    Tests share it, unless they give an `owner`: those that break their cluster do.
    """
    yield from _clusters(real=True)


@pytest.fixture
def cluster(slurm_cluster: Boot) -> Iterator[Cluster]:
    """The shared cluster of four nodes; Slurm's commands of this process speak to it."""
    with slurm_cluster(4).selected() as selected:
        yield selected


@pytest.fixture(scope="session")
def validation_cluster() -> Iterator[Boot]:
    """`validation_cluster(nodes, gpus_per_node=8)`: judges jobs (`--test-only`), runs none."""
    yield from _clusters(real=False)


@dataclass(frozen=True)
class EarlyJobs:
    """Jobs whose test takes Slurm a minute; started first, so that other tests run meanwhile."""

    cluster: Cluster
    over_time: str
    """A job that runs past its time limit, on n0."""
    node_lost: str
    """A job of two nodes, one of which lost its power; it writes a line at each start."""
    starts: Path
    """The lines that `node_lost` writes."""


@pytest.fixture(scope="session")
def early_jobs(slurm_cluster: Boot, tmp_path_factory: pytest.TempPathFactory) -> EarlyJobs:
    """Submit the slow jobs on a cluster of their own, and pull the plug of a node."""
    cluster = slurm_cluster(4, owner="early")
    folder = tmp_path_factory.mktemp("early")
    starts = folder / "starts"
    with cluster.selected():
        over_time = submit(folder, "sleep 600", "--nodelist=n0", "--time=1")
        body = f'echo "$SLURM_JOB_NODELIST" >>{starts}; [ "$SLURM_RESTART_COUNT" ] || sleep 600'
        node_lost = submit(folder, body, "--nodes=2", "--exclude=n0", "--requeue")
        assert wait_state(node_lost, "RUNNING").nodes == "n[1-2]"
        wait_until(node_lost, lambda _: starts.exists())
        cluster.kill("n2")
    return EarlyJobs(cluster, over_time, node_lost, starts)
