"""Numbers put into made-up published runs come out of the fit again."""

import math
from dataclasses import replace

import pytest

from megatron_mone.common.phases import ATTENTION, BACKWARD, FORWARD
from megatron_mone.planning.cost.bands import place_of
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.routing_skew import Skew
from megatron_mone.planning.fitting import published_fit
from megatron_mone.planning.fitting.published import PublishedRun
from megatron_mone.planning.fitting.published_fit import (
    BOUNDS,
    fit_published,
    replanned,
    start_values,
    times_off,
    with_values,
)
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.planner import Planned
from megatron_mone.planning.tracing.trace import FUNCTION_NODE, Collective, Op
from megatron_mone.planning.tracing.trace_server import TracedJob
from tests.unit.planning.made_jobs import CLUSTER, facts, move, product, trace

FACTS = facts(pp=1, dp=16, micro_batches=2, tp=2)
# A memory of 1e12 bytes a second, beside which the assumed cost of a small kernel is microseconds.
FAST = replace(CLUSTER, device=replace(CLUSTER.device, memory_bandwidth=1e12))
GATHER = Collective("all_reduce", 60_000_000, "tp", 2, 1, ATTENTION, BACKWARD)
# Each is mostly of one kind: GEMMs, bytes, many short launches, communication beside GEMMs.
PASSES = (FORWARD, BACKWARD)
STAGES = {
    "gemms": trace(product(40), product(80, BACKWARD)),
    "bytes": trace(move(60_000), move(60_000, BACKWARD)),
    "launches": trace(
        move(0.001),
        *(Op(FUNCTION_NODE, (), (), "none", 0, 0, 0, ATTENTION, p, 300) for p in PASSES),
    ),
    "overlap": trace(product(5), product(80, BACKWARD), GATHER),
}
KNOWN = start_values()
PUT_IN = {
    "compute": 0.62, "memory": 0.83, "function_seconds": 2.6e-4, "overlap_tax": 0.35,
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
    assert moved(function_seconds=3e-4) == {"launches"}
    assert moved(overlap_tax=0.5) == {"overlap"}
    assert not moved(compute=0.6) & {"bytes", "launches"}
    assert not moved(memory=0.7) & {"gemms", "overlap"}


@pytest.mark.parametrize("free", list(PUT_IN))
def test_one_number_is_found_again(free):
    put_in = {**KNOWN, free: PUT_IN[free]}
    found = fit_published(rows_by(put_in), [free])
    assert found.values[free] == pytest.approx(PUT_IN[free], rel=0.06)
    assert {name: found.values[name] for name in KNOWN if name != free} == {
        name: value for name, value in KNOWN.items() if name != free
    }
    assert max(map(abs, found.errors.values())) < 0.02


def test_all_numbers_are_found_again_together():
    put_in = {**KNOWN, **PUT_IN}
    found = fit_published(rows_by(put_in), list(PUT_IN))
    assert max(map(abs, found.errors.values())) < 0.02
    for name in ("compute", "memory", "function_seconds"):
        assert found.values[name] == pytest.approx(PUT_IN[name], rel=0.05), name
    # A percent of compute is worth many of the tax on it: of all it is told apart least.
    assert found.values["overlap_tax"] == pytest.approx(PUT_IN["overlap_tax"], abs=0.1)


def test_a_run_with_a_cause_of_its_own_drags_the_others_little():
    """Of three equal runs one is published at half the time."""
    [(run, plan)] = rows_by(KNOWN, ("gemms",))
    half = {"step_ms": run.figures["step_ms"] / 2}
    rows = [(run, plan), (replace(run, name="again"), plan)]
    rows.append((replace(run, name="odd", figures=half), plan))
    found = fit_published(rows, ["compute"])
    assert 1.0 < found.values["compute"] < 1.1  # by squares alone the third root of 2, 1.26


def test_a_fit_says_what_it_was_fitted_to_and_gives_that_efficiency():
    rows = rows_by({**KNOWN, **PUT_IN}, ("gemms", "bytes"))
    found = fit_published(rows, ["compute", "memory"])
    assert found.efficiency.source == "fitted to 2 published runs: gemms, bytes"
    assert replace(found.efficiency, runs=(), numbers=0) == with_values(
        found.values, found.efficiency.source
    )
    assert found.errors == times_off(rows, found.efficiency)
    again = fit_published(rows, ["compute", "memory"])
    assert again == found


def test_bounds_hold_where_a_run_is_faster_than_any():
    rows = [(replace(run, figures={"step_ms": 1.0}), plan) for run, plan in rows_by(KNOWN)]
    found = fit_published(rows, ["compute"])
    assert 1.3 < found.values["compute"] <= BOUNDS["compute"][1]
    assert all(error > 0 for error in found.errors.values())


def test_fewer_runs_than_numbers_are_refused():
    with pytest.raises(ValueError, match="1 published runs cannot fit 2 numbers") as failure:
        fit_published(rows_by(KNOWN, ("gemms",)), ["compute", "memory"])
    assert "\n" not in str(failure.value)


def test_values_scale_the_curves_given_and_the_assumed_ones():
    given = {"gemm": replace(Efficiency().curves["gemm"], peak_share=0.5)}
    start, found = Efficiency(), with_values({**KNOWN, **PUT_IN}, "a test", given)
    for kind, curve in {**start.curves, **given}.items():
        is_product = kind in published_fit.PRODUCTS
        assert found.curves[kind].peak_share == (
            pytest.approx(curve.peak_share * (0.62 if is_product else 1.0))
        )
        assert found.curves[kind].bandwidth_share == (
            pytest.approx(curve.bandwidth_share * (1.0 if is_product else 0.83))
        )
    assert (found.function_seconds, found.overlap_tax) == (2.6e-4, 0.35)
    assert found.hidden_share == start.hidden_share


def test_a_fit_leaves_what_bands_are_made_of():
    found = fit_published(rows_by({**KNOWN, **PUT_IN}, ("gemms", "bytes")), ["compute", "memory"])
    assert [run.name for run in found.efficiency.runs] == ["gemms", "bytes"]
    assert {run.place for run in found.efficiency.runs} == {place_of(FACTS)}
    assert found.efficiency.numbers == 2
    for run in found.efficiency.runs:
        assert run.error == pytest.approx(abs(math.log1p(found.errors[run.name])))


def test_planned_again_only_the_prediction_changes():
    [(_, plan)] = rows_by(KNOWN, ("gemms",))
    slower = replanned(plan, with_values({**KNOWN, "compute": 0.5}, "half"))
    assert slower.prediction.seconds > 1.5 * plan.prediction.seconds
    assert replace(slower, prediction=plan.prediction) == plan
    assert replanned(slower, Efficiency()).prediction.seconds == plan.prediction.seconds
