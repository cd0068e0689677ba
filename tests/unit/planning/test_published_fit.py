"""Numbers put into made-up published runs come out of the fit again."""

from dataclasses import replace

import pytest

from megatron_mone.common.phases import ATTENTION, BACKWARD
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.routing_skew import Skew
from megatron_mone.planning.fitting import published_fit
from megatron_mone.planning.fitting.published import PublishedRun
from megatron_mone.planning.fitting.published_fit import (
    BOUNDS,
    fit_published,
    replanned,
    times_off,
    with_values,
)
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.planner import Planned
from megatron_mone.planning.tracing.trace import Collective
from megatron_mone.planning.tracing.trace_server import TracedJob
from tests.unit.planning.made_jobs import CLUSTER, facts, move, product, trace

FACTS = facts(pp=1, dp=16, micro_batches=2, tp=2)
# A memory of 1e12 bytes a second, beside which the assumed cost of a small kernel is microseconds.
FAST = replace(CLUSTER, device=replace(CLUSTER.device, memory_bandwidth=1e12))
GATHER = Collective("all_reduce", 60_000_000, "tp", 2, 1, ATTENTION, BACKWARD)
# Each is mostly of one kind: GEMMs, bytes, many short launches, communication beside GEMMs.
STAGES = {
    "gemms": trace(product(40), product(80, BACKWARD)),
    "bytes": trace(move(60_000), move(60_000, BACKWARD)),
    "launches": trace(
        move(0.001, name="fused.swiglu", count=900),
        move(0.001, BACKWARD, name="fused.swiglu_backward", count=900),
    ),
    "overlap": trace(product(5), product(80, BACKWARD), GATHER),
}
PUT_IN = {"compute": 0.62, "memory": 0.83, "host_seconds": 6.6e-5, "overlap_tax": 0.35}
# Half the distance between values of the last grid: nothing is found nearer.
STEP = {
    name: (high - low) / 2 / (published_fit._STEPS // 2) / 2 ** (published_fit._ROUNDS - 1) / 2
    for name, (low, high) in BOUNDS.items()
}
KNOWN = {
    "compute": 1.0, "memory": 1.0, "host_seconds": Efficiency().host_seconds,
    "overlap_tax": Efficiency().overlap_tax,
}  # fmt: skip


def rows_by(values, names=tuple(STAGES)):
    """Runs published as fast as they are predicted with `values`, planned with assumptions."""
    rows = []
    for name in names:
        traces = {(0, 0): STAGES[name]}
        time = predict(traces, FACTS, FAST, with_values(values, "put in")).seconds
        run = PublishedRun(
            name=name, kind="step", gpus=16, cluster="paper", routing="balanced", extra=False,
            job=JobSpec(name, {}, {}, {}, {}), figures={"step_ms": 1e3 * time},
            full_attention=False, calibrates=True, skew=Skew(),
        )  # fmt: skip
        plan = predict(traces, FACTS, FAST, Efficiency())
        rows.append((run, Planned(run.job, TracedJob(FACTS, traces, 0.0, 0), {}, plan, 1.0)))
    return rows


def test_every_stage_depends_on_what_it_is_there_for():
    """Otherwise the tests below prove nothing."""
    before = {run.name: run.figures["step_ms"] for run, _ in rows_by(KNOWN)}

    def moved(**changes):
        after = {run.name: run.figures["step_ms"] for run, _ in rows_by({**KNOWN, **changes})}
        return {name for name in before if abs(after[name] / before[name] - 1) > 0.03}

    assert moved(compute=0.6) >= {"gemms", "overlap"}
    assert moved(memory=0.7) >= {"bytes"}
    assert moved(host_seconds=1e-4) == {"launches"}
    assert moved(overlap_tax=0.5) == {"overlap"}
    assert not moved(compute=0.6) & {"bytes", "launches"}
    assert not moved(memory=0.7) & {"gemms", "overlap"}


@pytest.mark.parametrize("free", list(BOUNDS))
def test_one_number_is_found_again(free):
    put_in = {**KNOWN, free: PUT_IN[free]}
    found = fit_published(rows_by(put_in), [free])
    assert found.values[free] == pytest.approx(PUT_IN[free], abs=1.01 * STEP[free])
    assert {name: found.values[name] for name in KNOWN if name != free} == {
        name: value for name, value in KNOWN.items() if name != free
    }
    assert max(map(abs, found.errors.values())) < 1.1 * STEP[free] / PUT_IN[free]


def test_all_numbers_are_found_again_together():
    found = fit_published(rows_by(PUT_IN), list(BOUNDS))
    most = max(STEP[name] / PUT_IN[name] for name in ("compute", "memory", "host_seconds"))
    assert max(map(abs, found.errors.values())) < most
    for name in ("compute", "memory", "host_seconds"):
        assert found.values[name] == pytest.approx(PUT_IN[name], rel=0.05), name
    # A percent of compute is worth many of the tax on it: of all it is told apart least.
    assert found.values["overlap_tax"] == pytest.approx(PUT_IN["overlap_tax"], abs=0.1)


def test_a_fit_says_what_it_was_fitted_to_and_gives_that_efficiency():
    rows = rows_by(PUT_IN, ("gemms", "bytes"))
    found = fit_published(rows, ["compute", "memory"])
    assert found.efficiency.source == "fitted to 2 published runs: gemms, bytes"
    assert found.efficiency == with_values(found.values, found.efficiency.source)
    assert found.errors == times_off(rows, found.efficiency)
    again = fit_published(rows, ["compute", "memory"])
    assert again == found


def test_bounds_hold_where_a_run_is_faster_than_any():
    rows = [(replace(run, figures={"step_ms": 1.0}), plan) for run, plan in rows_by(KNOWN)]
    found = fit_published(rows, ["compute"])
    assert found.values["compute"] == BOUNDS["compute"][1]
    assert all(error > 0 for error in found.errors.values())


def test_fewer_runs_than_numbers_are_refused():
    with pytest.raises(ValueError, match="1 published runs cannot fit 2 numbers") as failure:
        fit_published(rows_by(KNOWN, ("gemms",)), ["compute", "memory"])
    assert "\n" not in str(failure.value)


def test_values_scale_the_assumed_curves():
    start, found = Efficiency(), with_values(PUT_IN, "a test")
    for kind, curve in start.curves.items():
        share = curve.peak_share * (0.62 if kind in ("gemm", "grouped_gemm", "attention") else 1.0)
        assert found.curves[kind].peak_share == pytest.approx(share)
        assert found.curves[kind].bandwidth_share == pytest.approx(0.83 * curve.bandwidth_share)
    assert (found.host_seconds, found.overlap_tax) == (6.6e-5, 0.35)
    assert found.hidden_share == start.hidden_share


def test_planned_again_only_the_prediction_changes():
    [(_, plan)] = rows_by(KNOWN, ("gemms",))
    slower = replanned(plan, with_values({**KNOWN, "compute": 0.5}, "half"))
    assert slower.prediction.seconds > 1.5 * plan.prediction.seconds
    assert replace(slower, prediction=plan.prediction) == plan
    assert replanned(slower, Efficiency()).prediction.seconds == plan.prediction.seconds
