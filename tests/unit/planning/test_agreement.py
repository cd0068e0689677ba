"""Spread around the bias, and the order of layouts: by hand, and of figures in the right groups."""

import math
from dataclasses import replace

import pytest

from megatron_mone.planning.fitting.agreement import (
    Scatter,
    by_device,
    by_model,
    kendall_tau,
    report,
)
from megatron_mone.planning.fitting.published import Comparison
from megatron_mone.planning.job import JobSpec
from tests.unit.planning.test_published_rows import run_of

VALUES = {"hidden_size": 64, "num_layers": 2, "vocab_size": 32, "seq_length": 128}


def step(name, predicted, published, samples=16, figure="step ms", **changes):
    job = JobSpec(name, {**VALUES, "global_batch_size": samples}, {}, {}, {})
    return Comparison(run_of(name=name, job=job, **changes), figure, predicted, published)


def test_scatter_by_hand():
    found = Scatter.of([-0.10, 0.02, -0.04])
    assert found.bias == pytest.approx(-0.04)
    assert found.mean == pytest.approx(0.16 / 3)
    assert found.spread == pytest.approx(math.sqrt((0.06**2 + 0.06**2) / 3))
    assert (found.count, found.worst) == (3, -0.10)


def test_a_bias_alone_is_no_spread():
    assert Scatter.of([0.25] * 4).spread == 0.0


def test_tau_by_hand():
    """Of the 3 pairs of 1, 2, 3 against 1, 3, 2 two agree; equal published figures decide none."""
    assert kendall_tau([(1, 1), (3, 2), (2, 3)]) == pytest.approx(1 / 3)
    assert kendall_tau([(1, 3), (2, 2), (3, 1)]) == -1.0
    assert kendall_tau([(1, 5), (2, 5)]) is None
    assert kendall_tau([(2, 1), (2, 3)]) == 0.0  # predicted alike: neither order


def test_groups_are_of_one_cluster_and_one_model():
    other = replace(run_of().job, name="wide", model={**VALUES, "hidden_size": 128})
    rows = [
        step("a", 1, 1), step("b", 2, 2), step("c", 3, 3, cluster="rack"),
        step("d", 4, 4, routing="skewed"), step("e", 9, 9, figure="peak GiB"),
        Comparison(run_of(name="f", job=other), "step ms", 5, 5),
    ]  # fmt: skip
    names = {key: [one.run.name for one in group] for key, group in by_device(rows).items()}
    assert names == {"paper": ["a", "b", "d", "f"], "rack": ["c"]}
    assert {key: len(group) for key, group in by_model(rows).items()} == {"a": 2}


def test_orders_are_of_the_time_of_a_token():
    """The step of twice the samples is longer, and its tokens are cheaper."""
    text = report([step("small", 10, 10), step("large", 16, 18, samples=32)])
    assert "2 runs, tau +1.00" in text
    wrong = report([step("small", 10, 10), step("large", 21, 18, samples=32)])
    assert "2 runs, tau -1.00" in wrong


def test_a_peer_stands_beside_us_on_its_own_runs():
    peer = {"name": "Other 1", "step_ms": 9.0, "peak_allocated": 1.0}
    first = step("first", 11, 10, peer=peer)
    second = step("second", 19, 20, peer={**peer, "step_ms": 8.0})
    lines = report([first, second, step("alone", 50, 10)]).splitlines()
    at = lines.index("step ms of the runs that Other 1 predicts:")
    assert "2 figures, mean |error| 7.5%, bias +2.5%, spread 7.5 points" in lines[at + 1]
    assert "2 figures, mean |error| 35.0%, bias -35.0%" in lines[at + 2]
    assert lines[at + 3].endswith("2 runs, tau +1.00, Other 1 -1.00")


def test_what_was_fitted_to_is_told_apart():
    lines = report([step("fitted", 10, 10, calibrates=True), step("held", 12, 10)]).splitlines()
    assert "2 figures, mean |error| 10.0%" in lines[1]
    assert "1 figures, mean |error| 20.0%" in lines[2]
