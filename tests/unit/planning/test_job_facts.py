"""Facts of a job: what Megatron derives from flags, read right, and kept in JSON."""

import json
from argparse import Namespace
from dataclasses import asdict

import pytest

from megatron_mone.common.documents import record_of
from megatron_mone.common.phases import PHASES
from megatron_mone.planning.cost.roofline import DTYPES
from megatron_mone.planning.tracing.job_facts import JobFacts, _graphs, job_facts
from tests.training_cases import MOCK, TINY
from tests.unit.planning.parsed_jobs import JOB, parsed

# TINY: L 2, H 32, 4 heads, E 4, K_E 2, F 48, 32 tokens, vocabulary of 127 padded to 128.
L, H, K_E, F, S, V = 2, 32, 2, 48, 32, 128


def facts_of(monkeypatch, *flags, world_size=1, base=JOB):
    return job_facts(*parsed(monkeypatch, [*base, *flags], world_size))


def test_sizes_of_a_layout(monkeypatch):
    facts = facts_of(
        monkeypatch,
        *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--num-layers", "8"),
        *("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
        *("--expert-model-parallel-size", "4", "--expert-tensor-parallel-size", "1"),
        *("--context-parallel-size", "2", "--global-batch-size", "24"),
        world_size=24,
    )
    assert (facts.tp, facts.cp, facts.pp, facts.vp, facts.dp) == (2, 2, 2, 2, 3)
    assert (facts.ep, facts.etp, facts.edp) == (4, 1, 3)
    assert facts.micro_batches == 24 // (2 * 3)
    assert facts.microbatch_group_size_per_vp_stage == 2  # P, if not given
    assert facts.overlap_p2p
    assert (facts.num_layers, facts.hidden_size, facts.seq_length) == (8, H, S)


def test_experts(monkeypatch):
    mone = facts_of(monkeypatch)
    assert (mone.num_experts, mone.topk, mone.moe_ffn_hidden_size) == (4, K_E, F)
    assert mone.neurons_per_token == F // 4
    assert (mone.router_groups, mone.router_group_topk) == (0, 0)
    assert mone.dispatcher == "alltoall"
    grouped = ("--moe-router-num-groups", "2", "--moe-router-group-topk", "1",
               "--moe-router-topk", "2")  # fmt: skip
    stock = facts_of(monkeypatch, *grouped, base=(*TINY, *MOCK))
    assert stock.neurons_per_token == F
    assert (stock.router_groups, stock.router_group_topk) == (2, 1)


def test_a_dense_model_has_no_experts(monkeypatch):
    dropped = {"--num-experts", "--moe-router-topk", "--moe-ffn-hidden-size",
               "--moe-token-dispatcher-type", "--moe-aux-loss-coeff", "--moe-router-dtype",
               "--moe-router-load-balancing-type"}  # fmt: skip
    flags = [*TINY, *MOCK]
    for name in dropped:
        at = flags.index(name)
        del flags[at : at + 2]
    facts = facts_of(monkeypatch, base=flags)
    assert (facts.num_experts, facts.topk, facts.neurons_per_token) == (0, 0, 0)
    assert facts.dispatcher == ""


def test_model_operations_read_experts_as_dense(monkeypatch):
    """Six operations a weight and token, three times two for the causal half of the scores."""
    facts = facts_of(monkeypatch)
    layer = 4 * H * H + K_E * 3 * H * F
    # Half of [S, S] scores and of their product with values, each forward once, backward twice.
    scores = 2 * 3 * 2 * (S * S // 2) * H
    tokens = 8 * S
    expected = tokens * 6 * (L * layer + H * V) + 8 * L * scores
    assert facts.model_flops_per_step == pytest.approx(expected, rel=1e-9)
    # Of 9 N H F multiply-adds MoNE needs 1 + 8 r.
    saved = L * tokens * K_E * H * F * 2 * (9 - (1 + 8 / 4))
    assert facts.active_flops_per_step == pytest.approx(expected - saved, rel=1e-9)
    assert facts.active_flops_per_step <= facts.executed_flops_per_step


def test_buckets(monkeypatch):
    """40M parameters, or 1M for each copy; all in one where nothing overlaps."""
    assert facts_of(monkeypatch).bucket_size == 0
    overlap = ("--overlap-grad-reduce", "--use-distributed-optimizer")
    assert facts_of(monkeypatch, *overlap).bucket_size == 40_000_000
    many = (*overlap, "--global-batch-size", "128")
    assert facts_of(monkeypatch, *many, world_size=64).bucket_size == 64_000_000
    with_cp = (*overlap, "--context-parallel-size", "2", "--global-batch-size", "64")
    assert facts_of(monkeypatch, *with_cp, world_size=64).bucket_size == 64_000_000
    assert facts_of(monkeypatch, *overlap, "--ddp-bucket-size", "7").bucket_size == 7


def test_buckets_by_number_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"ddp_num_buckets = 3 cannot be planned: .*-size"):
        facts_of(monkeypatch, "--ddp-num-buckets", "3")


def test_recompute(monkeypatch):
    assert facts_of(monkeypatch).recompute_granularity == ""
    assert facts_of(monkeypatch).recompute_modules == ()
    selective = ("--recompute-granularity", "selective", "--recompute-modules", "moe", "mlp")
    facts = facts_of(monkeypatch, *selective)
    assert (facts.recompute_granularity, facts.recompute_modules) == (
        "selective", ("moe", "mlp"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "dtype"), [("--bf16", "bf16"), ("--fp16", "fp16"), (None, "fp32")]
)
def test_dtype_of_the_peak(monkeypatch, flag, dtype):
    facts = facts_of(monkeypatch, *filter(None, [flag]), base=(*TINY, *MOCK))
    assert DTYPES[facts.params_dtype] == dtype


@pytest.fixture(scope="module")
def facts():
    recompute = ("--recompute-granularity", "selective", "--recompute-modules", "moe")
    with pytest.MonkeyPatch.context() as patches:
        return facts_of(patches, *recompute)


def test_json_gives_the_facts_back(facts, tmp_path):
    written = json.loads(json.dumps(asdict(facts)))
    assert record_of(JobFacts, written, tmp_path / "f.json", "again") == facts


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda d: d.pop("etp"), "no field 'etp'"),
        (lambda d: d.update(dp=1.5), "dp"),
        (lambda d: d.update(overlap_tp=1), "overlap_tp: must be true or false"),
        (lambda d: d.update(fp8=None), "fp8: must be a text"),
        (lambda d: d.update(recompute_modules="moe"), "recompute_modules: must be a list"),
        (lambda d: d.update(model_flops_per_step=-1), "model_flops_per_step"),
    ],
)
def test_damaged_json_is_one_line(facts, tmp_path, change, fault):
    written = asdict(facts)
    change(written)
    with pytest.raises(ValueError, match=fault) as failure:
        record_of(JobFacts, written, tmp_path / "f.json", "again")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("modules", "graphs", "phases"),
    [
        (["attn"], 1, {"attention"}),
        (["attn", "moe_router"], 2, {"attention", "layer norm", "router"}),
        (["moe_preprocess", "moe_router"], 1, {"layer norm", "router"}),
    ],
)
def test_graphs(modules, graphs, phases):
    """What a pass of a layer is launched as."""
    args = Namespace(cuda_graph_impl="transformer_engine", cuda_graph_modules=modules)
    assert _graphs(args)["graphs_per_layer"] == graphs
    assert set(_graphs(args)["graphed"]) == phases


def test_graphs_of_a_layer_and_of_all():
    layer = _graphs(Namespace(cuda_graph_impl="local", cuda_graph_modules=None))
    assert layer["graphs_per_layer"] == 1
    assert {"attention", "dense MLP", "up/down GEMM", "combine"} < set(layer["graphed"])
    step = _graphs(Namespace(cuda_graph_impl="full_iteration", cuda_graph_modules=None))
    assert set(step["graphed"]) == set(PHASES)
    assert _graphs(Namespace(cuda_graph_impl="none", cuda_graph_modules=["attn"])) == {}
