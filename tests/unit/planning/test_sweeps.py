"""Other numbers of devices, neurons and experts: traces scaled and made, and sweeps on paper."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_mone.common.phases import GATE_GEMM
from megatron_mone.planning.composed import scaled_facts, scaled_traces
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.planner import Planned
from megatron_mone.planning.sweeps import RATIOS, SCALES, expert_sweep, ratio_sweep, scaling_curve
from megatron_mone.planning.tracing.trace_cache import TraceCache
from megatron_mone.planning.tracing.trace_server import TracedJob
from tests.training_cases import MOCK
from tests.unit.planning.made_jobs import CLUSTER, EXACT, FACTS, TRACES, facts

FEW, MANY = 16, 64
MODEL = (
    *MOCK, "--num-layers", "4", "--hidden-size", "256", "--num-attention-heads", "4",
    "--num-experts", "8", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "128",
    "--ffn-hidden-size", "512", "--swiglu", "--disable-bias-linear", "--normalization", "RMSNorm",
    "--seq-length", "1024", "--max-position-embeddings", "1024", "--position-embedding-type",
    "rope", "--bf16", "--untie-embeddings-and-output-weights", "--micro-batch-size", "1",
    "--moe-router-dtype", "fp32", "--moe-grouped-gemm", "--moe-token-dispatcher-type", "alltoall",
    "--attention-dropout", "0", "--hidden-dropout", "0", "--use-distributed-optimizer",
    "--overlap-grad-reduce", "--overlap-param-gather", "--mone-neuron-ratio", "0.25",
)  # fmt: skip
LAYOUTS = {
    "EP4 PP2": ("--expert-model-parallel-size", "4", "--pipeline-model-parallel-size", "2"),
    "TP2 EP2": (
        "--tensor-model-parallel-size", "2", "--sequence-parallel",
        "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tracer(shared_tracer, tmp_path_factory):
    return shared_tracer(TraceCache(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("cluster", ["h100-ndr", "gb200-nvl72"])
def test_scaled_traces_are_those_of_the_larger_job(tracer, name, cluster):
    """4 samples of each device's replica, on 16 and on 64 devices."""

    def traced(gpus):
        return tracer.trace((*MODEL, *LAYOUTS[name], "--global-batch-size", str(4 * gpus)), gpus)

    few, many = traced(FEW), traced(MANY)
    wide = scaled_facts(few.facts, MANY)
    scaled = scaled_traces(few.traces, few.facts, MANY)
    assert wide == many.facts
    machine, efficiency = load_cluster(cluster), Efficiency()
    real = predict(many.traces, many.facts, machine, efficiency)
    found = predict(scaled, wide, machine, efficiency)
    assert found.seconds == pytest.approx(real.seconds, rel=0.01)
    for one, other in zip(found.memory_P, real.memory_P, strict=True):
        assert one.optimizer == pytest.approx(other.optimizer, rel=0.01)
        assert (one.weights, one.gradients) == pytest.approx((other.weights, other.gradients))
        assert one.activations == other.activations
    # Without scaling they are not: the optimizer's state is shared by four times as many.
    before = predict(few.traces, few.facts, machine, efficiency)
    assert before.memory_P[0].optimizer > 3 * found.memory_P[0].optimizer
    for place in many.traces:
        groups = [{(c.group, c.ranks) for c in traces[place].collectives if c.group != "pp"}
                  for traces in (scaled, many.traces)]  # fmt: skip
        assert {one for one in groups[0] if one[0] in ("dp", "dp-cp", "edp", "ep", "tp")} == {
            one for one in groups[1] if one[0] in ("dp", "dp-cp", "edp", "ep", "tp")
        }


class PaperPlanner:
    """Plans every job as the paper job, with what its arguments say of experts; keeps the jobs."""

    def __init__(self):
        self.cluster, self.efficiency, self.jobs = CLUSTER, EXACT, []

    def plan(self, job, gpus):
        self.jobs.append(job)
        kept, topk = job.model["mone_neurons_per_token"], job.model["moe_router_topk"]
        of = facts(world_size=gpus, neurons_per_token=kept, topk=topk,
                   active_flops_per_step=1e12 * kept * topk)  # fmt: skip
        prediction = predict(TRACES, of, CLUSTER, EXACT)
        phases = {**prediction.phases, GATE_GEMM: 1e-3}  # TRACES have no expert
        return SimpleNamespace(prediction=replace(prediction, phases=phases))


def job(ratio=0.25, width=768, topk=8, experts=64, **more):
    """Of a MoNE model."""
    model = {"moe_ffn_hidden_size": width, "moe_router_topk": topk, "num_experts": experts,
             "mone_neuron_ratio": ratio, **more}  # fmt: skip
    return JobSpec("a", {k: v for k, v in model.items() if v is not None}, {}, {}, {})


def test_a_curve_has_the_scales_that_the_layout_admits():
    plan = Planned(job(), TracedJob(FACTS, TRACES, 0.0, 0), {}, predict(TRACES, FACTS, CLUSTER,
                   EXACT), 1.0)  # fmt: skip
    planner = PaperPlanner()
    curve = scaling_curve({"mone": plan, "moe": plan}, planner)
    assert [point.gpus for point in curve] == list(SCALES) == [128 << k for k in range(8)]
    for point in curve:
        of = scaled_facts(FACTS, point.gpus)
        alone = predict(scaled_traces(TRACES, FACTS, point.gpus), of, CLUSTER, EXACT)
        assert point.models["mone"] == point.models["moe"]
        assert point.models["mone"].step_ms == 1e3 * alone.seconds
        assert of.micro_batches == FACTS.micro_batches
    peaks = [point.models["mone"].peak_gib for point in curve]
    assert peaks == sorted(peaks, reverse=True)
    # 96 devices to a replica: only multiples of 96 hold one, and none of the scales is.
    odd = facts(world_size=96, dp=1, edp=1, pp=96, global_batch_size=4)
    never = Planned(job(), TracedJob(odd, {}, 0.0, 0), {}, plan.prediction, 1.0)
    assert scaling_curve({"odd": never}, planner) == []


def test_a_sweep_over_r_descends_from_all_neurons():
    planner, told = PaperPlanner(), []
    points = ratio_sweep(job(), 16, planner, lambda done, total: told.append((done, total)))
    assert [point.r for point in points] == list(RATIOS)
    assert [point.neurons for point in points] == [768, 384, 192, 96, 48]
    assert [one.model["mone_neurons_per_token"] for one in planner.jobs] == [768, 384, 192, 96, 48]
    assert not any("mone_neuron_ratio" in one.model for one in planner.jobs)
    assert told == [(k, 5) for k in range(5)]
    assert [point.active_flops for point in points] == [8e12 * point.neurons for point in points]


def test_few_neurons_are_rounded_to_multiples_of_8_and_not_repeated():
    points = ratio_sweep(job(width=64), 16, PaperPlanner())
    assert [(point.neurons, point.r) for point in points] == [
        (64, 1.0), (32, 0.5), (16, 0.25), (8, 0.125),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("width", "groups", "block", "kept"),
    [
        (768, 1, 192, [768, 384, 192]),
        (1408, 1, 11, [1408, 704, 352, 176, 88]),
        (768, 2, 48, [768, 384, 192, 96]),
        (1536, 3, 1, [1536, 768, 384, 192, 96]),
    ],
)
def test_kept_neurons_are_whole_blocks_of_each_group(width, groups, block, kept):
    asked = job(width=width, mone_neuron_groups=groups, mone_neuron_block=block)
    assert [point.neurons for point in ratio_sweep(asked, 16, PaperPlanner())] == kept
    pairs = [point.neurons for point in expert_sweep(asked, 16, PaperPlanner(), [])]
    assert width // 4 in pairs
    assert not any(neurons % (groups * block) for neurons in pairs)


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ({}, 192),
        ({"ratio": 0.5}, 384),
        ({"ratio": None, "mone_neurons_per_token": 96}, 96),
        ({"topk": 4, "width": 2048}, 512),
        ({"experts": 10}, 192),
    ],
)
def test_pairs_of_equal_operations(model, kept):
    """2 H K_E (F + 8 K_N): the gate whole, two products forward, six backward; K_N rounded to 8."""
    asked = job(**model)
    width, topk = asked.model["moe_ffn_hidden_size"], asked.model["moe_router_topk"]
    budget = topk * (width + 8 * kept)
    planner = PaperPlanner()
    points = expert_sweep(asked, 16, planner, [])
    assert len(points) > 2
    assert (topk, kept) in [(point.topk, point.neurons) for point in points]
    for point, one in zip(points, planner.jobs, strict=True):
        experts, neurons = point.topk, point.neurons
        assert abs(experts * (width + 8 * neurons) - budget) <= experts * 8 * 4
        assert 0 < neurons <= width
        assert experts <= asked.model["num_experts"]
        assert point.r == neurons / width
        assert (one.model["moe_router_topk"], one.model["mone_neurons_per_token"]) == (
            experts, neurons,
        )  # fmt: skip
    found = [(point.topk, point.neurons) for point in points]
    assert found == sorted(found)
    assert [neurons for _, neurons in found] == sorted((n for _, n in found), reverse=True)
    # No pair is left out: one expert fewer asks for more neurons than there are, one more for
    # fewer than 8, or there is none.
    fewer, more = found[0][0] - 1, found[-1][0] + 1
    assert fewer == 0 or (budget / fewer - width) / 8 > width
    assert more > asked.model["num_experts"] or (budget / more - width) / 8 < 8


def test_a_pair_that_megatron_refuses_is_left_out_and_said():
    planner, skipped = PaperPlanner(), []
    plan = planner.plan

    def refuse_one_expert(one, gpus):
        if one.model["moe_router_topk"] == 3:
            raise ValueError("Megatron refuses topk 3")
        return plan(one, gpus)

    planner.plan = refuse_one_expert
    points = expert_sweep(job(topk=4, width=2048), 16, planner, skipped)
    assert points
    assert 3 not in [point.topk for point in points]
    [line] = skipped
    assert line.startswith("K_E = 3, ")
    assert line.endswith("is left out of the sweep: Megatron refuses topk 3")
