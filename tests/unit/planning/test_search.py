"""Searching layouts: what is tried, refused, hopeless; fronts, reasons and cheapest fixes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.routing_skew import ZIPF, Skew
from megatron_mone.planning.fixes import changes, cheapest_fix
from megatron_mone.planning.job import SHORT, JobSpec
from megatron_mone.planning.layout_axes import ALLOWABLE, OFFLOAD, PRECISION, Axes, all_shards
from megatron_mone.planning.layout_model import Model
from megatron_mone.planning.plan_document import Search
from megatron_mone.planning.planner import Planned, rows_of
from megatron_mone.planning.scaled_bound import Bound
from megatron_mone.planning.search import (
    LIMIT,
    SLOWER,
    TOO_LARGE,
    WHOLE,
    Found,
    NoBounds,
    explain,
    pareto,
    search,
)
from megatron_mone.planning.terminal_tables import (
    nothing_fits,
    nothing_planned,
    search_table,
    table,
)
from megatron_mone.planning.tracing.trace_server import TracedJob
from tests.unit.planning.made_jobs import CLUSTER, EXACT, MEMORY, STAGE, facts, trace

GPUS = 16
JOB = JobSpec("tiny", {"num_experts": 8}, {}, {}, {"micro_batch_size": 1, "global_batch_size": 32})
GIB = 2**30


class PaperPlanner:
    """Plans without Megatron: every layout's stage is STAGE, its memory given by a rule.

    Args:
        memory_of: layout values -> bytes that a micro-batch keeps.
        refuses: layout values -> reason or None.
    """

    def __init__(self, memory_of=lambda values: MEMORY.activations, refuses=lambda values: None):
        self.cluster = replace(CLUSTER, device=replace(CLUSTER.device, memory_bytes=3 * GIB))
        self.tracer = SimpleNamespace(
            describe=lambda flags, gpus: SimpleNamespace(facts=self.facts({}))
        )
        self.memory_of, self.refuses = memory_of, refuses
        self.planned = []

    def flags(self, job):
        return []

    def facts(self, values):
        sizes = {k: values.get(name) or 1 for k, name in SHORT.items()}
        pp, tp = sizes["pp"], sizes["tp"]
        dp = max(1, GPUS // (pp * tp))
        return facts(
            world_size=GPUS, tp=tp, pp=pp, vp=sizes["vpp"], ep=sizes["ep"], etp=sizes["etp"], dp=dp,
            edp=max(1, GPUS // (pp * sizes["ep"] * sizes["etp"])), micro_batches=32 // dp,
            micro_batch_size=sizes["mbs"],
            recompute_granularity=values.get("recompute_granularity") or "",
            recompute_modules=tuple(values.get("recompute_modules") or ()),
            microbatch_group_size_per_vp_stage=pp,
        )  # fmt: skip

    def plan(self, job, gpus):
        values = job.values()
        reason = self.refuses(values)
        if reason is not None:
            raise ValueError(reason)
        self.planned.append(values)
        of = self.facts(values)
        memory = replace(MEMORY, activations=self.memory_of(values))
        stage = trace(*STAGE.ops, *STAGE.collectives, memory=memory)
        traces = {(p, v): stage for p in range(of.pp) for v in range(of.vp)}
        prediction = predict(traces, of, self.cluster, EXACT)
        return Planned(job, TracedJob(of, traces, 0.0, 1), {}, prediction, 1.0)


class PaperBounds(NoBounds):
    """Of a paper planner's layouts: those that it says, or next to nothing.

    Args:
        planner: whose layouts.
        bound_of: shards, pipeline -> bound.
    """

    every = Axes(("none", "full"), ("fp32", "bf16", "host"), ("none", "moe_act"))

    def __init__(self, bound_of=lambda shards, pipeline: Bound(0.0, 0.0, 0.0)):
        super().__init__(layers=4)
        self.bound_of = bound_of

    def first(self, shards, pipeline):
        return self.bound_of(shards, pipeline)

    second = first


@pytest.fixture
def few_shards(monkeypatch):
    """A dozen shardings for tests that try all that can be tried of each."""
    kept = [(tp, ep, mbs) for tp in (1, 4) for ep in (1, 4) for mbs in (1, 4)]
    monkeypatch.setattr(
        "megatron_mone.planning.search.all_shards",
        lambda *of: [one for one in all_shards(*of) if (one.tp, one.ep, one.mbs) in kept],
    )


@pytest.fixture
def searched(monkeypatch):
    """Search on paper: composing needs traces of Megatron's, which test_bounds.py has."""

    def run(planner, limit, best=3, bounds=None, progress=None, allowed=()):
        model = Model(JOB, planner.facts({}), ("moe",) * 4, 0, GPUS)
        monkeypatch.setattr(
            "megatron_mone.planning.search.prepared",
            lambda *_: (model, bounds or PaperBounds(), planner),
        )
        return search(planner, JOB, GPUS, limit, best, progress, allowed)

    return run


def seconds_of(found):
    return [one.planned.prediction.seconds for one in found.candidates]


def test_a_search_sorts_by_time_and_keeps_reasons(searched):
    refuses = lambda v: "Megatron refuses tp" if v[SHORT["tp"]] == 2 else None  # noqa: E731
    planner = PaperPlanner(refuses=refuses)
    found = searched(planner, 12)
    assert len(found.candidates) == 12
    assert len(planner.planned) == 12 + 3  # the fastest again, whole
    assert seconds_of(found) == sorted(seconds_of(found))
    assert found.not_tried[LIMIT] > 0
    assert found.least_seconds == 0
    planner.planned.clear()
    everything = searched(planner, 10_000, best=1000)
    assert len(planner.planned) == len(everything.candidates) + WHOLE
    assert not everything.not_tried
    assert everything.least_seconds is None
    assert all("tp=2" in layout for layout, _ in everything.refused)
    assert {reason for _, reason in everything.refused} == {"Megatron refuses tp"}


def test_an_interrupt_keeps_what_there_is(searched):
    def stop(done, limit, layout):
        if done == 3:
            raise KeyboardInterrupt

    found = searched(PaperPlanner(), 100, progress=stop)
    assert len(found.candidates) == 3
    assert found.not_tried["interrupt"] > 0


def test_bounds_end_a_search_at_the_best_of_all(searched):
    """Whatever true bounds: what is found is what planning everything finds."""
    everything = searched(PaperPlanner(), 10_000, best=1000)
    exact = {one.layout: one.planned.prediction.seconds for one in everything.candidates}
    planner = PaperPlanner()

    def bound_of(shards, pipeline):
        fields = {**shards.fields, **pipeline.fields(0)}
        true = planner.plan(JOB.with_layout(fields), GPUS).prediction.seconds
        return Bound(true * (0.8 + 0.2 * (shards.ep % 3 == 1)), 0.0, 0.0)

    found = searched(PaperPlanner(), 10_000, best=3, bounds=PaperBounds(bound_of))
    assert seconds_of(found)[:3] == sorted(exact.values())[:3]
    assert found.not_tried[SLOWER] > 0
    assert len(found.candidates) + found.not_tried[SLOWER] == len(exact)


def test_what_cannot_fit_is_not_planned(searched, few_shards):
    """Large layouts are tried with recomputation, and hopeless ones with less state if allowed."""

    def bound_of(shards, pipeline):
        limit = 3 * GIB
        held = 2 * limit if shards.ep == 1 and shards.state == "fp32" else 0
        plain = shards.recompute == "none" == shards.offload
        kept = 2 * limit if shards.mbs == 4 and plain else 0
        return Bound(0.0, held, held + kept)

    planner, bounds = PaperPlanner(), PaperBounds(bound_of)
    found = searched(planner, 10_000, best=1000, bounds=bounds)
    assert found.axes == {PRECISION: "left out", OFFLOAD: "left out"}
    assert found.hopeless
    assert all("ep=" not in layout.replace("tp=", "") for layout in found.hopeless)
    assert found.not_tried[TOO_LARGE] > 0
    names = {one.layout for one in found.candidates}
    assert names.isdisjoint(found.hopeless)
    assert not any("state=" in name or "offload=" in name for name in names)
    for name in names:
        assert ("recompute=full" in name) == ("mbs=4" in name)
        assert "ep=" in name.replace("tp=", "")
    more = searched(planner, 10_000, best=1000, bounds=bounds, allowed=ALLOWABLE)
    assert more.axes == {PRECISION: "allowed", OFFLOAD: "allowed"}
    by_name = {one.layout for one in more.candidates}
    assert names < by_name
    for name in by_name - names:
        # A step of less precise state may be shorter: it is tried of all; the host's is not.
        hopeless, large = "ep=" not in name.replace("tp=", ""), "mbs=4" in name
        assert "state=bf16" in name or hopeless or large
        assert ("state=host" in name) <= (hopeless or large)
        assert ("offload=moe_act" in name) <= large
    assert any("state=host" in name for name in by_name)
    assert any("offload=moe_act" in name for name in by_name)


def test_what_was_not_allowed_is_tried_where_nothing_fits(searched, few_shards):
    """And not where something does; one line says which."""

    def kept(values):
        offloaded = values.get("fine_grained_activation_offloading")
        return 1 if offloaded and values.get("optimizer_cpu_offload") else 4 * GIB

    found = searched(PaperPlanner(memory_of=kept), 10_000, best=1000)
    assert found.axes == {PRECISION: "needed", OFFLOAD: "needed"}
    assert found.fitting
    assert all("state=host" in one.layout and "offload=" in one.layout for one in found.fitting)
    halfway = searched(PaperPlanner(memory_of=kept), 10_000, allowed=(PRECISION,))
    assert halfway.axes == {PRECISION: "allowed", OFFLOAD: "needed"}
    assert halfway.fitting
    limited = searched(PaperPlanner(memory_of=kept), 3)
    assert limited.axes == {PRECISION: "left out", OFFLOAD: "left out"}


def test_an_unfit_layout_is_tried_with_less(searched, few_shards):
    kept = lambda values: 1 if values.get("recompute_granularity") else 4 * GIB  # noqa: E731
    found = searched(PaperPlanner(memory_of=kept), 10_000, best=1000)
    assert found.fitting
    assert all("recompute=full" in one.layout for one in found.fitting)


def test_the_front_has_who_is_not_both_slower_and_larger(searched):
    smaller_if_full = lambda v: 10**6 if v.get("recompute_granularity") == "full" else 10**8  # noqa: E731
    found = searched(PaperPlanner(memory_of=smaller_if_full), 40)
    front = pareto(found.candidates)
    assert found.candidates[0].layout in front
    peaks = [
        max(m.peak for m in one.planned.prediction.memory_P)
        for one in found.candidates
        if one.layout in front
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    assert "compute" in explain(found.candidates[0], found.candidates[0])
    assert "slower, most of it" in explain(found.candidates[-1], found.candidates[0])


def test_the_cheapest_fix_is_the_fastest_change_that_fits():
    def kept(values):
        return 10**7 if values.get("recompute_granularity") else 2 * GIB

    planner = PaperPlanner(memory_of=kept)
    planned = planner.plan(JOB.with_layout({SHORT["pp"]: 2, SHORT["ep"]: 4}), GPUS)
    assert not planned.prediction.fits
    words, fitting = cheapest_fix(planner, planned, GPUS)
    assert words == "recompute layernorm+moe_act"
    assert fitting.prediction.fits
    hopeless = PaperPlanner(memory_of=lambda values: 100 * GIB)
    assert cheapest_fix(hopeless, planned, GPUS) is None


def test_fixes_do_not_repeat_what_is_done():
    words = [text for text, _ in changes(facts(recompute_granularity="full", micro_batch_size=2))]
    assert "micro batch 1" in words
    assert "recompute full" not in words
    assert "recompute layernorm+moe_act" not in words


def test_why_nothing_fits_is_one_line(searched):
    found = searched(PaperPlanner(memory_of=lambda values: 100 * GIB), 5)
    assert found.fitting == []
    line = nothing_fits(found, "tiny", GPUS, CLUSTER.device)
    assert "none of 5 layouts of tiny fits 16 x" in line
    refused = Found(refused=[("tp=1", "Megatron refuses that")])
    assert "Megatron refuses that" in nothing_planned(refused, "tiny", GPUS, CLUSTER.device)
    assert "has no layout on 16 devices" in nothing_planned(Found(), "a", GPUS, CLUSTER.device)
    assert "2 are too large even without activations" in nothing_planned(
        Found(hopeless=["a", "b"]), "tiny", GPUS, CLUSTER.device
    )
    assert "\n" not in line


def as_object(document):
    """The fields that a table reads as attributes, as a document has them."""
    return json.loads(json.dumps(document), object_hook=lambda fields: SimpleNamespace(**fields))


def test_tables_say_what_fits_and_what_would():
    model = {
        "name": "mone", "step_ms": 1234.0, "tokens_per_s_per_gpu": 10.0, "tflops_per_gpu": 5.0,
        "mfu": 0.25, "exposed_comm_ms": 123.4, "bubble_ms": 0.0,
        "memory_gib": {"peak": 90.0}, "step_ms_band": None,
        "peak_gib_band": None,
        "host": None,
        "fits": False, "first_unfit": "activations",
        "cheapest_fix": {"change": "recompute full", "step_ms": 2000.0},
    }  # fmt: skip
    plan = {
        "model": "tiny", "gpus": 16, "cluster": {"device": "GPU", "memory_gib": 80.0},
        "routing": {"kind": "balanced"}, "efficiency": "assumed", "models": [model],
    }  # fmt: skip
    text = table(as_object(plan))
    assert "no, by activations; cheapest fix: recompute full (2,000 ms)" in text
    assert "10.0%" in text
    assert "try --search" in table(as_object({**plan, "models": [{**model, "cheapest_fix": None}]}))
    found = as_object({
        **plan, "candidates": [{"name": "tp=1", "step_ms": 10.0, "peak_gib": 5.0}], "refused": [],
        "hopeless": [], "best": [{"layout": "tp=1", "why": "90% compute"}],
    })  # fmt: skip
    left = {"not_tried": {"limit": 7}, "least_ms": 9.0}
    axes = {"axes": {PRECISION: "left out", OFFLOAD: "needed"}}
    search_text = search_table(Search.model_construct(**vars(found), **left, **axes))
    assert "less precise moments and gradients; --allow precision" in search_text
    assert "nothing fits without offloading to the host" in search_text
    assert "7 beyond --limit, of which none takes less than 9 ms" in search_text
    assert "1. tp=1: 10 ms, 5.0 GiB" in search_text


def test_skewed_rows_are_of_one_router_call():
    of = facts(tp=2, cp=2, micro_batch_size=4, seq_length=128)
    rows = rows_of(Skew(ZIPF, 0.5), of)
    assert sum(rows) == 4 * 128 // 4 * of.topk
    assert rows_of(Skew(), of) is None
    assert rows_of(Skew(ZIPF, 0.5), facts(num_experts=0)) is None
