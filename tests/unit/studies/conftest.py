"""Studies whose runs are made up: none is trained, each has numbers of its name."""

import random

import pytest

from launch.runs import kept_runs
from megatron_mone.reporting.page.events import Histogram
from megatron_mone.reporting.page.results import LayerLoad, RunResult
from megatron_mone.studies.runs import RANKS


@pytest.fixture
def trained(monkeypatch, tmp_path) -> list[str]:
    """Names of the runs that were trained, each ending at a loss of its seed and name."""
    names: list[str] = []

    def collect(name, folder, *, steps, fingerprint, command, load_average) -> RunResult:
        draw = random.Random(name)
        loss = 3 + draw.random()
        load = LayerLoad(Histogram(steps, (0.5, 1.0), (6.0, 2.0)), 2.0)
        return RunResult(
            name, fingerprint, command, load_average, steps, RANKS, 2048, 2e9, 1e9,
            [(steps, loss)], [(1, 7.0), (steps, loss)], [(steps, 0.5)], [(steps, 1.0)],
            [(steps, 1.0)], 10**9, {"1": [load]},
        )  # fmt: skip

    monkeypatch.setattr(kept_runs, "collect", collect)
    monkeypatch.setattr(kept_runs, "data_facts", lambda prefixes: list(prefixes))
    monkeypatch.setattr(kept_runs, "open_run", lambda *words: None)
    monkeypatch.setattr("launch.spec.training_job.data_prefixes", lambda *words: ("data",))
    return names
