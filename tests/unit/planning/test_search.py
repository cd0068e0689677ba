"""Searching layouts: what is tried, refused, hopeless; fronts, reasons and cheapest fixes."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.routing_skew import ZIPF, Skew
from megatron_mone.planning.job import SHORT, JobSpec
from megatron_mone.planning.plan_document import Search
from megatron_mone.planning.planner import Planned, rows_of
from megatron_mone.planning.search import (
    Found,
    Held,
    changes,
    cheapest_fix,
    explain,
    layouts,
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


@pytest.fixture(autouse=True)
def _plans_on_paper(monkeypatch):
    """Composing needs traces of Megatron's; test_composed.py holds it to whole ones."""
    monkeypatch.setattr("megatron_mone.planning.search.Composer", lambda planner: planner)


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


def sizes(**given):
    return dict(tp=1, cp=1, pp=1, vpp=1, ep=1, etp=1, mbs=1, recompute="none") | given


def test_layouts_use_all_devices_and_divide_the_batch():
    found = list(layouts(facts(global_batch_size=64), GPUS, domain=8))
    assert found
    assert len({tuple(one.items()) for one in found}) == len(found)
    for one in found:
        assert GPUS % (one["tp"] * one["pp"] * one["cp"]) == 0
        assert GPUS % (one["ep"] * one["etp"] * one["pp"]) == 0
        assert one["etp"] in (1, one["tp"])
        assert one["pp"] * one["vpp"] <= 4  # layers
        assert one["cp"] == 1  # a short sequence
    assert {one["recompute"] for one in found} == {"none", "layernorm+moe_act", "full"}
    long = layouts(facts(global_batch_size=64, seq_length=32768), GPUS, domain=8)
    assert {one["cp"] for one in long} == {1, 2, 4, 8}


def test_a_search_sorts_by_time_and_keeps_reasons():
    refuses = lambda v: "Megatron refuses tp" if v[SHORT["tp"]] == 2 else None  # noqa: E731
    planner = PaperPlanner(refuses=refuses)
    found = search(planner, JOB, GPUS, 12, 3)
    assert len(found.candidates) == 12
    assert len(planner.planned) == 12 + 3  # the fastest again, whole
    seconds = [one.planned.prediction.seconds for one in found.candidates]
    assert seconds == sorted(seconds)
    assert found.not_tried > 0
    everything = search(planner, JOB, GPUS, 10_000, 3)
    assert everything.not_tried == 0
    assert all("tp=2" in layout for layout, _ in everything.refused)
    assert {reason for _, reason in everything.refused} == {"Megatron refuses tp"}


def test_an_interrupt_keeps_what_there_is():
    planner = PaperPlanner()

    def stop(done, limit, layout):
        if done == 3:
            raise KeyboardInterrupt

    found = search(planner, JOB, GPUS, 100, 3, stop)
    assert len(found.candidates) == 3
    assert found.not_tried > 0


SIZES = st.fixed_dictionaries({
    "tp": st.sampled_from([1, 2, 4]), "pp": st.sampled_from([1, 2, 4, 8]),
    "ep": st.sampled_from([1, 2, 4, 8]), "etp": st.sampled_from([1, 2, 4]),
})  # fmt: skip


@dataclass
class PaperModel:
    """Bytes of a model by what shards them; each of its 8 layers alike."""

    sharded: int  # of a layer, by tensor parallelism
    whole: int  # of a layer, by nothing: norms, routers
    embedding: int  # by tensor parallelism; at the first stage, and again at the last if tied
    tied: bool
    experts: int  # of a layer
    weights: float  # bytes of weights over bytes of gradients
    state: float  # bytes of optimizer state over bytes of gradients
    shared: bool  # among replicas

    def traced(self, sizes, gpus):
        """Traces of its stages in a layout, and its facts."""
        tp, pp, ep, etp = (sizes[name] for name in ("tp", "pp", "ep", "etp"))
        dp, edp = gpus // (tp * pp), gpus // (ep * etp * pp)
        is_apart = ep > 1  # Megatron's experts of ep = 1 are parameters like others
        memories = {}
        for stage in range(pp):
            dense = 8 / pp * (self.sharded / tp + self.whole)
            dense += self.embedding / tp * ((stage == 0) + (self.tied and 0 < stage == pp - 1))
            experts = 8 / pp * self.experts / (ep * etp)
            shards = (dp, edp) if self.shared else (1, 1)
            state = dense / shards[0], experts / shards[1]
            memories[stage, 0] = replace(
                MEMORY, weights=self.weights * (dense + experts), gradients=dense + experts,
                optimizer=self.state * sum(state), expert_weights=is_apart * self.weights * experts,
                expert_gradients=is_apart * experts,
                expert_optimizer=is_apart * self.state * state[1],
            )  # fmt: skip
        of = facts(**sizes, world_size=gpus, dp=dp, edp=edp, distributed_optimizer=self.shared)
        return {place: trace(memory=memory) for place, memory in memories.items()}, of

    def fullest(self, sizes, gpus):
        """Bytes of weights, gradients and optimizer of the stage that has most."""
        memories = [trace.memory for trace in self.traced(sizes, gpus)[0].values()]
        return max(m.weights + m.gradients + m.optimizer for m in memories)


MODELS = st.builds(
    PaperModel, *(st.integers(10**6, 10**9),) * 3, st.booleans(), st.integers(10**6, 10**11),
    st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([0.0, 1.5, 3.0]), st.booleans(),
)  # fmt: skip


@given(MODELS, SIZES, SIZES)
def test_no_layout_is_said_to_hold_more_than_it_does(model, planned, other):
    """Whatever layout was planned before."""
    held = Held.of(*model.traced(planned, 256))
    assert held.least_bytes(other, 256) <= 1.000001 * model.fullest(other, 256)


@given(MODELS, SIZES, SIZES)
def test_more_shards_are_known_from_fewer(model, planned, other):
    """The bound is worth something: it is what a layout holds that shards everything further."""
    model = replace(model, whole=0, embedding=0)
    other = {name: max(size, planned[name]) for name, size in other.items()}
    if planned["ep"] == 1:
        other |= {name: planned[name] for name in ("tp", "ep", "etp")}
    held = Held.of(*model.traced(planned, 1024))
    least, true = held.least_bytes(other, 1024), model.fullest(other, 1024)
    assert least >= 0.97 * true


def test_a_search_begins_with_layouts_that_hold_experts_whole():
    """64 H100, moe-30b-a3b: 8.6 GB a rank in all layouts, and 81 GB of experts by ep."""
    gib = 2**30
    model = PaperModel(gib, 0, gib, False, 27 * gib, 0.5, 2.0, True)
    whole = Held.of(*model.traced({"tp": 1, "pp": 1, "ep": 1, "etp": 1}, 64))
    split = {"tp": 1, "pp": 2, "ep": 8, "etp": 1}
    assert whole.least_bytes(split, 64) == 0
    assert whole.least_bytes({**split, "ep": 1}, 64) > 80 * gib
    halved = Held.of(*model.traced({"tp": 1, "pp": 1, "ep": 2, "etp": 1}, 64))
    assert 20 * gib < halved.least_bytes(split, 64) < 40 * gib
    assert halved.least_bytes({**split, "ep": 1}, 64) > 80 * gib


def test_what_cannot_fit_is_not_planned():
    planner = PaperPlanner()
    planner.cluster = replace(planner.cluster, device=replace(CLUSTER.device, memory_bytes=2e7))
    found = search(planner, JOB, GPUS, 1000, 0)
    assert found.hopeless
    assert len(planner.planned) + len(found.hopeless) == len(
        list(layouts(planner.facts({}), GPUS, 8))
    )


def test_the_front_has_who_is_not_both_slower_and_larger():
    smaller_if_full = lambda v: 10**6 if v.get("recompute_granularity") == "full" else 10**8  # noqa: E731
    found = search(PaperPlanner(memory_of=smaller_if_full), JOB, GPUS, 40, 3)
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


def test_why_nothing_fits_is_one_line():
    found = search(PaperPlanner(memory_of=lambda values: 100 * GIB), JOB, GPUS, 5, 3)
    assert found.fitting == []
    line = nothing_fits(found, "tiny", GPUS, CLUSTER.device)
    assert "none of 5 layouts of tiny fits 16 x" in line
    refused = Found(refused=[("tp=1", "Megatron refuses that")])
    assert "Megatron refuses that" in nothing_planned(refused, "tiny", GPUS, CLUSTER.device)
    assert "in any of 2 layouts" in nothing_planned(
        Found(hopeless=["a", "b"]), "tiny", GPUS, CLUSTER.device
    )
    assert "\n" not in line


def as_object(document):
    """The fields that a table reads as attributes, as a document has them."""
    return json.loads(json.dumps(document), object_hook=lambda fields: SimpleNamespace(**fields))


def test_tables_say_what_fits_and_what_would():
    model = {
        "name": "mone", "step_ms": 1234.0, "tokens_per_s_per_gpu": 10.0, "tflops_per_gpu": 5.0,
        "mfu": 0.25, "exposed_comm_ms": 123.4, "bubble_ms": 0.0, "memory_gib": {"peak": 90.0},
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
        "hopeless": [], "not_tried": 7, "best": [{"layout": "tp=1", "why": "90% compute"}],
    })  # fmt: skip
    search_text = search_table(Search.model_construct(**vars(found)))
    assert "7 not tried" in search_text
    assert "1. tp=1: 10 ms, 5.0 GiB" in search_text


def test_skewed_rows_are_of_one_router_call():
    of = facts(tp=2, cp=2, micro_batch_size=4, seq_length=128)
    rows = rows_of(Skew(ZIPF, 0.5), of)
    assert sum(rows) == 4 * 128 // 4 * of.topk
    assert rows_of(Skew(), of) is None
    assert rows_of(Skew(ZIPF, 0.5), facts(num_experts=0)) is None
