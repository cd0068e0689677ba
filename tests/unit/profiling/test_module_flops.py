"""Operations by module against hand counts, the cost table of MoNE, and torch's counter; peaks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_mone.benchmarking import machine_limits
from megatron_mone.benchmarking.cases import Cell
from megatron_mone.common.phases import (
    ATTENTION,
    DENSE_MLP,
    GATE_GEMM,
    LATENT,
    LOSS,
    ROUTER,
    SHARED_EXPERTS,
    UP_DOWN_GEMM,
)
from megatron_mone.kernels import registry
from megatron_mone.kernels.cpu import backend as cpu
from megatron_mone.kernels.grouped_mlp import mone_grouped_mlp
from megatron_mone.model import module_flops as flops
from megatron_mone.model.module_flops import WHOLE_LAYER, LayerShare, RankShare
from megatron_mone.model.step_flops import step_flops
from megatron_mone.profiling import peaks
from megatron_mone.profiling.document_lengths import DocumentLengths
from megatron_mone.profiling.flop_counter import FlopCounter
from tests.conftest import mone_config

HIDDEN, WIDTH, ROWS, KEPT = 16, 24, 10, 60
ALL = ROWS * WIDTH
SHARE = RankShare(
    layers=(), output_uses=0, micro_batches=2, tokens=96, sequence_length=24, tp=1, etp=1,
    vocabulary=640, local_experts=4,
)  # fmt: skip
DENSE = LayerShare("dense")
STOCK = LayerShare("moe", ROWS)
MONE = LayerShare("mone", ROWS, KEPT)
native = pytest.mark.skipif(not cpu.available()[0], reason="the CPU kernels cannot be built here")


def config_of(**changes):
    config = mone_config(**{"mone_backend": "reference", "num_query_groups": 2} | changes)
    config.multi_latent_attention = False
    return config


def count(layer, config=None, **changes):
    share = replace(SHARE, layers=(layer,), **changes)
    return flops.module_flops(config or config_of(), share)


def both(value):
    return {"executed": value, "active": value}


def test_each_part_by_hand():
    """Three passes of 2 operations; 16 wide, 2 heads of 8, 96 tokens in sequences of 24."""
    config = config_of(moe_shared_expert_intermediate_size=20, moe_shared_expert_gate=True)
    found = count(STOCK, config, output_uses=1)
    query_key_value, out, scores = 16 * 48, 16 * 16, 24 * 2 * 16
    assert found[ATTENTION] == both(6 * 96 * (query_key_value + out + scores))
    assert found[ROUTER] == both(6 * 96 * 16 * 4)
    assert found[SHARED_EXPERTS] == both(6 * 96 * 16 * (3 * 20 + 1))
    assert found[UP_DOWN_GEMM] == both(6 * 16 * 3 * ALL)
    assert found[LOSS] == both(6 * 96 * 16 * 640)
    assert count(DENSE, config)[DENSE_MLP] == both(6 * 96 * 16 * 3 * 32)
    assert list(found) == [ATTENTION, ROUTER, UP_DOWN_GEMM, SHARED_EXPERTS, LOSS]


def test_experts_of_a_latent_width_and_the_projections_around_them():
    """8 wide inside; each token goes down and up once, whatever its number of experts."""
    config = config_of(moe_latent_size=8)
    again = replace(STOCK, repeats=frozenset({"moe"}))
    found = count(STOCK, config)
    assert found[UP_DOWN_GEMM] == both(6 * 8 * 3 * ALL)
    assert found[LATENT] == both(6 * 96 * 2 * 16 * 8)
    assert count(again, config)[LATENT]["executed"] == 8 * 96 * 2 * 16 * 8
    assert LATENT not in count(STOCK)
    whole, mone = count(MONE)[UP_DOWN_GEMM], count(MONE, config)[UP_DOWN_GEMM]
    assert mone == {kind: work / 2 for kind, work in whole.items()}


def test_grouped_queries_output_gate_and_latent_attention():
    grouped = count(DENSE, config_of(num_query_groups=1))[ATTENTION]["active"]
    assert grouped == 6 * 96 * (16 * 32 + 16 * 16 + 24 * 2 * 16)
    gated = config_of()
    gated.attention_output_gate = True
    assert count(DENSE, gated)[ATTENTION]["active"] == 6 * 96 * (16 * 64 + 256 + 768)
    latent = config_of()
    vars(latent).update(
        multi_latent_attention=True, q_lora_rank=12, kv_lora_rank=6, qk_head_dim=5,
        qk_pos_emb_head_dim=3, v_head_dim=7,
    )  # fmt: skip
    down, up = 16 * 12 + 16 * (6 + 3), 12 * 2 * 8 + 6 * 2 * (5 + 7)
    rest = 2 * 7 * 16 + 24 * 2 * (8 + 7)
    assert count(DENSE, latent)[ATTENTION] == both(6 * 96 * (down + up + rest))
    again = count(replace(DENSE, repeats=frozenset({"mla_up_proj"})), latent)[ATTENTION]
    assert again["executed"] - again["active"] == 2 * 96 * up
    latent.q_lora_rank = None
    direct = 16 * 2 * 8 + 16 * 9 + 6 * 2 * 12
    assert count(DENSE, latent)[ATTENTION] == both(6 * 96 * (direct + rest))


def test_unknown_attention_is_left_out():
    config = config_of()
    config.experimental_attention_variant = "gated_delta_net"
    assert list(count(DENSE, config)) == [DENSE_MLP]


def test_products_are_split_over_tensor_ranks_and_the_router_by_tokens():
    config = config_of(moe_shared_expert_intermediate_size=20)
    layers = (STOCK, DENSE)
    whole = flops.module_flops(config, replace(SHARE, layers=layers, output_uses=1))
    config.sequence_parallel = True
    half = flops.module_flops(config, replace(SHARE, layers=layers, output_uses=1, tp=2, etp=2))
    assert half == {p: {k: v / 2 for k, v in counts.items()} for p, counts in whole.items()}
    config.sequence_parallel = False  # every rank then routes every token
    copied = flops.module_flops(config, replace(SHARE, layers=layers, output_uses=1, tp=2, etp=2))
    assert copied[ROUTER] == whole[ROUTER]


def test_prediction_has_a_projection_and_its_own_pass_of_the_output_layer():
    config = config_of()
    plain = count(STOCK, config, output_uses=1)
    predicting = count(replace(STOCK, mtp=True), config, output_uses=2)
    assert predicting.pop(LOSS) == both(6 * 96 * (2 * 16 * 16 + 2 * 16 * 640))
    again = count(replace(STOCK, mtp=True, repeats=WHOLE_LAYER), config)[LOSS]
    assert again["executed"] - again["active"] == 2 * 96 * 2 * 16 * 16
    del plain[LOSS]
    assert predicting == plain


def test_recompute_is_executed_and_not_active():
    config = config_of(moe_shared_expert_intermediate_size=20)
    for layer in (STOCK, DENSE, MONE):
        once, again = count(layer, config), count(replace(layer, repeats=WHOLE_LAYER), config)
        for phase, work in once.items():
            assert again[phase]["active"] == work["active"]
            if layer is not MONE or phase != UP_DOWN_GEMM:
                assert again[phase]["executed"] == pytest.approx(work["executed"] * 4 / 3)
    parts = {"core_attn": (DENSE, ATTENTION, 2 * 96 * 768), "mlp": (DENSE, DENSE_MLP, None)}
    for part, (layer, phase, more) in parts.items():
        work = count(replace(layer, repeats=frozenset({part})), config)[phase]
        assert work["executed"] - work["active"] == (more or work["active"] / 3)
    nested = replace(STOCK, repeats=frozenset({"moe", "shared_experts"}))
    work = count(nested, config)[SHARED_EXPERTS]
    assert work["executed"] == pytest.approx(work["active"] * 5 / 3)


def expert_totals(layer, config):
    works = flops.expert_work(config, SHARE, layer).values()
    return tuple(sum(getattr(w, kind) for w in works) / (2 * HIDDEN) for kind in both(0))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=native)])
def test_experts_follow_the_cost_table(backend):
    """docs/MODEL.md: 9 N H F for a dense expert, N H F (1 + 8 r) for kept neurons."""
    config, ratio = config_of(mone_backend=backend), KEPT / ALL
    executed, active = expert_totals(MONE, config)
    assert active == pytest.approx(ALL * (1 + 8 * ratio))
    assert executed == pytest.approx(active if backend == "cpu" else 9 * ALL)
    assert expert_totals(STOCK, config) == (9 * ALL, 9 * ALL)
    assert expert_totals(LayerShare("mone", ROWS), config) == (9 * ALL, 9 * ALL)  # every one kept
    if backend == "cpu":  # GEMMs over all where most are kept
        assert expert_totals(replace(MONE, kept=0.8 * ALL), config)[0] == 9 * ALL


def test_experts_without_gated_units_have_two_matrices():
    config = config_of(mone_neuron_ratio=None, gated_linear_unit=False)
    assert expert_totals(STOCK, config) == (6 * ALL, 6 * ALL)


@pytest.mark.parametrize("change", [{"mone_activation": "softmax"},
                                    {"mone_ng_loss_type": "normalized"}])  # fmt: skip
def test_gates_that_all_learn_have_a_dense_gradient(change):
    assert expert_totals(MONE, config_of(**change)) == (9 * ALL, 3 * ALL + 6 * KEPT)


ROUTES = {
    # backend, block: gate and up/down entries forward and backward, then with the layer recomputed
    ("reference", 1): ((0, 9 * ALL), (0, 12 * ALL)),
    ("cpu", 1): ((ALL, 8 * KEPT), (ALL, 11 * KEPT)),
    ("triton", 1): ((ALL, 8 * ALL), (2 * ALL, 10 * ALL)),
    ("sparse24", 1): (
        (ALL, 5 * ALL + 3 * KEPT),
        (2 * ALL, 6 * ALL + 4 * KEPT),
    ),
    ("te", 1): ((ALL, 8 * ALL), (2 * ALL, 10 * ALL)),
    ("te", 6): ((ALL, 8 * ALL), (2 * ALL, 10 * ALL)),
    ("triton", 6): ((ALL, 8 * KEPT), (2 * ALL, 10 * KEPT)),  # rows keep 6: one block
    ("triton", 2): ((ALL, 8 * KEPT), (2 * ALL, 10 * KEPT)),
    ("triton", 128): ((ALL, 8 * KEPT), (2 * ALL, 10 * KEPT)),
    ("triton", 352): ((ALL, 8 * KEPT), (2 * ALL, 10 * KEPT)),
    ("cpu", 352): ((ALL, 8 * KEPT), (ALL, 11 * KEPT)),
}


@pytest.mark.parametrize(("backend", "block"), ROUTES)
def test_what_each_backend_executes_and_where(backend, block, monkeypatch):
    chosen = SimpleNamespace(backend=SimpleNamespace(name=backend))
    monkeypatch.setattr(registry, "choose_backend", lambda name, call: chosen)
    config = config_of()
    config.mone_neuron_block = block
    for repeats, expected in zip((frozenset(), WHOLE_LAYER), ROUTES[backend, block], strict=True):
        works = flops.expert_work(config, SHARE, replace(MONE, repeats=repeats))
        found = [works[p].executed if p in works else 0 for p in (GATE_GEMM, UP_DOWN_GEMM)]
        assert found == [2 * HIDDEN * entries for entries in expected]


def test_the_log_counts_prediction_layers_of_the_kind_of_the_last(monkeypatch):
    monkeypatch.setattr(
        "megatron.training.training.num_floating_point_operations", lambda args, batch: 1e9
    )
    saved = []
    for depths in (None, 2):
        config = config_of(num_layers=2)
        config.mtp_num_layers = depths
        executed, active = step_flops(SimpleNamespace(seq_length=32), config, 3)
        saved.append(executed - active)
    assert saved[1] == 2 * saved[0] > 0


def test_bytes_are_those_of_the_roofline():
    """One micro-batch of many rows; a MoNE layer reads rows and kept gates once more, because gate
    and the rest are two phases."""
    config, share = config_of(), replace(SHARE, micro_batches=1)
    cell = Cell(tokens=2000, hidden=16, neurons=24, experts=4, ratios=(0.25,))
    rows, kept = 2000, 2000 * 6
    for layer, ratio in ((LayerShare("moe", rows), None), (LayerShare("mone", rows, kept), 0.25)):
        found = flops.expert_bytes(config, replace(share, layers=(layer,)))
        more = 0 if ratio is None else rows * 16 * 4 + kept * (4 + 2)
        expected = machine_limits.bytes_moved(cell, ratio, "forward_backward") + more
        assert sum(found.values()) == pytest.approx(expected)
    assert flops.expert_bytes(config, replace(SHARE, layers=(DENSE, LayerShare("moe")))) == {}


def test_bytes_by_phase_micro_batch_and_recompute(monkeypatch):
    chosen = SimpleNamespace(backend=SimpleNamespace(name="cpu"))
    monkeypatch.setattr(registry, "choose_backend", lambda name, call: chosen)
    once = replace(SHARE, layers=(MONE,), etp=2)
    found = flops.expert_bytes(config_of(), once)
    weight, rows = 2 * 4 * 12 * 16 * 4, ROWS * 16 * 4  # two micro-batches read it
    assert found[GATE_GEMM] == weight + rows + KEPT * 6
    assert found[UP_DOWN_GEMM] == 8 * weight + 5 * rows + KEPT * (6 + 4 + 6 + 4)
    again = flops.expert_bytes(
        config_of(), replace(once, layers=(replace(MONE, repeats=WHOLE_LAYER),))
    )
    assert again[GATE_GEMM] == 2 * found[GATE_GEMM]
    assert again[UP_DOWN_GEMM] - found[UP_DOWN_GEMM] == 2 * weight + 2 * rows + KEPT * 10


def model_of(*, numbers=(1, 2), prediction=0, post_process=True):
    layers = [SimpleNamespace(mlp=None, layer_number=number) for number in numbers]
    depths = [
        SimpleNamespace(mtp_model_layer=SimpleNamespace(mlp=None), layer_number=depth + 1)
        for depth in range(prediction)
    ]
    return SimpleNamespace(
        decoder=SimpleNamespace(layers=layers), post_process=post_process,
        mtp=SimpleNamespace(layers=depths) if prediction else None,
    )  # fmt: skip


ARGS = SimpleNamespace(micro_batch_size=3, seq_length=32, padded_vocab_size=640)


def test_share_of_a_stage_is_read_from_its_model(monkeypatch):
    monkeypatch.setattr(flops, "_kind", lambda layer: "mone")
    config = config_of(num_layers=4, context_parallel_size=2, expert_model_parallel_size=2,
                       tensor_model_parallel_size=2, expert_tensor_parallel_size=1,
                       sequence_parallel=True)  # fmt: skip
    chunks = [model_of(numbers=(1,), post_process=False), model_of(numbers=(3,))]
    share = flops.rank_share(
        ARGS, config, chunks, micro_batches=5, rows={1: 7, 2: 9, 3: 11}, kept={3: 50}
    )
    assert share == RankShare(
        layers=(LayerShare("mone", 7), LayerShare("mone", 11, 50)), output_uses=1,
        micro_batches=5, tokens=5 * 3 * 32 // 2, sequence_length=32, tp=2, etp=1, vocabulary=640,
        local_experts=2,
    )  # fmt: skip
    early = flops.rank_share(ARGS, config, chunks[:1], micro_batches=5, rows={1: 7})
    assert early.output_uses == 0


@pytest.mark.parametrize(("implementation", "keys"), [("local", 96), ("transformer_engine", 5.5)])
def test_packed_documents_need_their_own_keys_alone(monkeypatch, implementation, keys):
    monkeypatch.setattr(flops, "_kind", lambda layer: "dense")
    config = config_of(num_layers=2)
    config.transformer_impl = implementation
    chunks, given = [model_of()], {"micro_batches": 1, "rows": {}}
    share = flops.rank_share(ARGS, config, chunks, **given, document_tokens=5.5)
    assert (share.sequence_length, share.attended) == (96, 5.5)
    whole = flops.rank_share(ARGS, config, chunks, **given)
    packed, plain = (flops.module_flops(config, one)["attention"] for one in (share, whole))
    a_key = 3 * 2 * 3 * 32 * 2 * config.num_attention_heads * 2 * config.kv_channels
    assert plain["active"] - packed["active"] == pytest.approx(a_key * (32 - 5.5))
    assert packed["executed"] - plain["executed"] == pytest.approx(a_key * (keys - 32))


def test_document_lengths_are_those_of_measured_steps_alone(monkeypatch):
    from megatron.training import training

    monkeypatch.setattr(training, "_seqlen_stats_in_iteration", None)
    monkeypatch.setattr(training, "_seqlen_stats_active", False)

    def saw(*ends):
        training.update_seqlen_stats_from_cu_seqlens(torch.tensor([0, *ends], dtype=torch.int32))

    found = DocumentLengths()
    found.begin()
    found.end()
    assert found.mean() is None
    found.begin()
    saw(3, 4)
    found.end()
    saw(100)  # a step that is not measured
    found.begin()
    saw(2)
    found.end()
    assert found.mean() == pytest.approx((9 + 1 + 4) / (3 + 1 + 2))


def test_one_prediction_layer_may_stand_for_every_depth(monkeypatch):
    monkeypatch.setattr(flops, "_kind", lambda layer: "mone")
    config = config_of(num_layers=2)
    config.mtp_num_layers, config.mtp_use_repeated_layer = 2, True
    share = flops.rank_share(
        ARGS, config, [model_of(prediction=1)], micro_batches=1, rows={3: 8}, kept={3: 12}
    )
    assert share.layers[2:] == (LayerShare("mone", 4, 6, mtp=True),) * 2
    assert share.output_uses == 3


@pytest.mark.parametrize(("method", "repeated"), [("uniform", [1, 1, 1]), ("block", [1, 0, 0])])
def test_full_recompute_repeats_whole_layers(method, repeated):
    config = config_of(num_layers=2)
    vars(config).update(mtp_num_layers=1, recompute_granularity="full", recompute_method=method,
                        recompute_num_layers=1)  # fmt: skip
    share = flops.rank_share(ARGS, config, [model_of(prediction=1)], micro_batches=1, rows={})
    assert [layer.repeats == WHOLE_LAYER for layer in share.layers] == [bool(r) for r in repeated]


def test_counter_knows_grouped_mm_in_every_orientation():
    x, w = torch.randn(24, 16, requires_grad=True), torch.randn(3, 16, 32, requires_grad=True)
    ends = torch.tensor([8, 8, 20], dtype=torch.int32)
    with FlopCounter() as counter:
        F.grouped_mm(x, w, offs=ends)
    assert counter.total() == 2 * 20 * 16 * 32  # rows beyond the last group are not computed
    with FlopCounter() as counter:
        F.grouped_mm(w.detach().transpose(1, 2), x.detach().t().contiguous(), offs=ends)
    assert counter.total() == 2 * 20 * 16 * 32
    ends[-1] = 24
    with FlopCounter() as counter:  # backward: 2d x 3d for x, 2d x 2d for w
        F.grouped_mm(x, w, offs=ends).square().sum().backward()
    assert counter.by_operation() == {"_grouped_mm": 3 * 2 * 24 * 16 * 32}
    with FlopCounter() as counter:
        F.grouped_mm(torch.randn(2, 8, 16), torch.randn(2, 16, 24))
    assert counter.total() == 2 * 2 * 8 * 16 * 24


def test_counter_knows_what_torch_leaves_out():
    a, b, v = torch.randn(4, 3), torch.randn(3, 5), torch.randn(3)
    calls = {
        120: lambda: torch.zeros(4, 5).addmm_(a, b),
        240: lambda: torch.zeros(2, 4, 5).baddbmm_(a.expand(2, 4, 3), b.expand(2, 3, 5)),
        24: lambda: a @ v,
        6: lambda: v @ v,
    }
    for expected, call in calls.items():
        with FlopCounter() as counter:
            call()
        assert counter.total() == expected
    q, k, value = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    with FlopCounter() as counter:
        F.scaled_dot_product_attention(q, k, value, is_causal=True).sum().backward()
    assert counter.total() == 2 * 2 * 8 * 8 * 4 * (2 + 5)


@native
@pytest.mark.parametrize(("rows", "kept", "block", "gate"), [
    (40, 6, 1, "native dense_products"), (300, 6, 1, "mm"), (300, 16, 16, "mm"),
])  # fmt: skip
def test_counter_sees_the_native_kernels(rows, kept, block, gate):
    """Every route: N F gates, and eight products of each kept entry."""
    x = torch.randn(rows, 16, requires_grad=True)
    weights = [torch.randn(1, 32, 16, requires_grad=True) for _ in range(3)]
    with FlopCounter() as counter:
        y, _ = mone_grouped_mlp(x, torch.ones(rows), [rows], *weights, neurons_per_token=kept,
                                neuron_block=block, backend="cpu")  # fmt: skip
        y.sum().backward()
    found = counter.by_operation()
    assert found[gate] == 2 * rows * 32 * 16
    assert counter.total() - found[gate] == 8 * 2 * rows * kept * 16
    y, _ = mone_grouped_mlp(x, torch.ones(rows), [rows], *weights, neurons_per_token=kept,
                            backend="cpu")  # fmt: skip
    assert counter.by_operation() == found  # no longer watched


def test_published_peaks_are_of_the_exact_card():
    def rates(name, dtype=torch.bfloat16):
        found = peaks.published_peaks(name, dtype)
        return found.flops, found.bytes_per_s

    assert rates("NVIDIA H100 80GB HBM3") == (989e12, 3.35e12)
    assert rates("NVIDIA H100 PCIe")[1] == 2.0e12
    assert rates("NVIDIA A100-SXM4-40GB") == (312e12, 1.555e12)
    assert rates("NVIDIA A100-SXM4-80GB")[1] == 2.039e12
    assert rates("NVIDIA H200") == (989e12, 4.8e12)
    assert rates("NVIDIA B200", torch.float32) == (1.125e15, 8.0e12)
    assert rates("NVIDIA H200", torch.float64) == (None, 4.8e12)
    assert rates("NVIDIA GeForce RTX 4090") == (None, None)


class Machine:
    """A clock on which products of a dtype and copies take the time that the test sets.

    Args:
        product: seconds of a product by dtype, whatever its size.
        copy: seconds of a copy.
    """

    def __init__(self, product, copy):
        self.now, self.product, self.copy = 0.0, product, copy

    def perf_counter(self):
        return self.now

    def mm(self, a, b):
        self.now += self.product[a.dtype]

    def ones(self, elements):
        def copy_(source):
            self.now += self.copy

        return SimpleNamespace(nbytes=4 * elements, copy_=copy_)

    def install(self, monkeypatch):
        names = {name: getattr(torch, name) for name in ("float32", "bfloat16", "randn", "dtype")}
        own = {"mm": self.mm, "ones": self.ones, "empty_like": lambda other: other}
        monkeypatch.setattr(peaks, "torch", SimpleNamespace(**names, **own))
        monkeypatch.setattr(peaks, "time", self)


def test_measured_peaks_are_rates_over_a_while(monkeypatch):
    """Products of 256 take long enough, so none is larger: 2 x 256^3 operations in 0.125 s."""
    Machine({torch.float32: 0.125, torch.bfloat16: 0.5}, 0.25).install(monkeypatch)
    rounds = []
    found = peaks.measured_peaks(torch.bfloat16, lambda: rounds.append(1))
    # units that multiply bfloat16 more slowly than float32 are not the limit
    assert found == peaks.RankPeaks(2 * 256**3 / 0.125, 2 * 4 * peaks.COPIED / 0.25)
    assert len(rounds) == 3  # two dtypes, and copies: begun by all ranks at once


def test_faster_bfloat16_counts_and_short_products_grow(monkeypatch):
    Machine({torch.float32: 0.125, torch.bfloat16: 0.0625}, 0.25).install(monkeypatch)
    assert peaks.measured_peaks(torch.bfloat16, lambda: None).flops == 2 * 256**3 / 0.0625
    assert peaks.measured_peaks(torch.float32, lambda: None).flops == 2 * 256**3 / 0.125
    Machine({torch.float32: 2.0**-7}, 0.25).install(monkeypatch)
    assert peaks.measured_peaks(torch.float32, lambda: None).flops == 2 * 4096**3 * 128
