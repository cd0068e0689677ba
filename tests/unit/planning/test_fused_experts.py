"""Experts of a GPU job without values: bytes kept, operations and shapes against what is written
out here, and whole traces of small jobs of eight GPUs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_mone.common import phases
from megatron_mone.kernels.choice import BiasedRule, Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.planning.tracing.recorder import Recorder
from megatron_mone.planning.tracing.stand_ins import grouped_linear as fused_experts
from megatron_mone.planning.tracing.stand_ins import op as fused_op
from megatron_mone.planning.tracing.stand_ins.fp8 import (
    Float8BlockScaling,
    fp8_autocast,
    fp8_model_init,
)
from megatron_mone.planning.tracing.stand_ins.grouped_linear import (
    GroupedLinear,
    RowPadding,
    RowUnpadding,
)
from megatron_mone.planning.tracing.traced_backend import ask, keeps_all, on_gpu
from megatron_mone.planning.tracing.unknown_values import UnknownValues
from megatron_mone.profiling.clock import HostStamps, PhaseClock
from tests.unit.planning.one_trace import trace_rank

N, H, F, S = 96, 256, 160, 40
COUNTS = [40, 0, 56]
E = len(COUNTS)


@pytest.fixture
def recorder():
    """Listens while the test runs, on tensors without values."""
    found = Recorder(PhaseClock(HostStamps()))
    found.clock.begin()
    phases.listen(found.clock.enter)
    with fused_op.recording(found), UnknownValues(found.saw_operator):
        yield found
    phases.listen(None)


def config_of(**changes):
    values = {
        "params_dtype": torch.bfloat16, "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1, "tensor_model_parallel_size": 1,
        "gradient_accumulation_fusion": False, "mone_enabled": True, "mone_selection": "topk",
        "mone_neuron_ratio": S / F, "mone_neurons_per_token": None, "moe_ffn_hidden_size": F,
        "moe_router_padding_for_quantization": False,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def linear_of(mode, inputs, outputs, etp=1, **changes):
    return GroupedLinear(
        E, inputs, outputs, parallel_mode=mode, config=config_of(**changes), bias=False,
        pg_collection=SimpleNamespace(expt_tp=SimpleNamespace(size=lambda: etp)), is_expert=True,
    )  # fmt: skip


def rows_of(width, dtype=torch.bfloat16):
    return torch.empty(N, width, dtype=dtype, requires_grad=True)


def fused(recorder):
    return [op for op in recorder.ops if not op.name.startswith("aten.")]


def kept_bytes(recorder, held=()):
    """Bytes that autograd keeps, each storage once, but for those of `held`."""
    known = {tensor.untyped_storage()._cdata for tensor in held}
    return sum(size for key, size in recorder.kept() if key not in known)


def test_weights_are_those_of_transformer_engine(recorder):
    """[out, in] for each expert, columns or rows split over expert-tensor ranks, and reduced over
    the experts' replicas alone."""
    fc1, fc2 = linear_of("column", H, 2 * F, etp=2), linear_of("row", F, H, etp=2)
    assert [tuple(p.shape) for p in fc1.parameters()] == [(F, H)] * E
    assert [tuple(p.shape) for p in fc2.parameters()] == [(H, F // 2)] * E
    assert [name for name, _ in fc1.named_parameters()] == ["weight0", "weight1", "weight2"]
    for linear, dim in ((fc1, 0), (fc2, 1)):
        assert all(p.allreduce is False and p.partition_dim == dim for p in linear.parameters())
    dense = linear_of("column", H, F, expert_model_parallel_size=1)
    assert all(p.allreduce for p in dense.parameters())


def test_experts_with_a_bias_are_refused():
    with pytest.raises(ValueError, match="--disable-bias-linear"):
        GroupedLinear(
            E, H, F, parallel_mode="column", config=config_of(), bias=True,
            pg_collection=SimpleNamespace(expt_tp=None),
        )  # fmt: skip


def test_products_have_the_operations_and_shapes_of_the_formulas(recorder):
    linear = linear_of("column", H, 2 * F)
    y, bias = linear(rows_of(H), COUNTS)
    y.backward(torch.empty_like(y))
    assert bias is None
    once = 2 * N * H * 2 * F
    assert [(op.name, op.inputs, op.outputs, op.flops, op.dtype) for op in fused(recorder)] == [
        ("fused.grouped_gemm", ((N, H), (E, H, 2 * F)), ((N, 2 * F),), once, "bfloat16"),
        ("fused.grouped_gemm_dgrad", ((N, 2 * F), (E, 2 * F, H)), ((N, H),), once, "bfloat16"),
        ("fused.grouped_gemm_wgrad", ((N, H), (N, 2 * F)), ((E, H, 2 * F),), once, "bfloat16"),
    ]
    first = fused(recorder)[0]
    assert first.bytes_read == 2 * (N * H + E * H * 2 * F)
    assert first.bytes_written == 2 * N * 2 * F


def test_what_stock_experts_keep(recorder, monkeypatch):
    """x, fc1's output, the probabilities and the activation: N (2 H + 2 x 2 F + 4 + 2 F) bytes."""
    from megatron.core.fusions import fused_bias_swiglu

    for name in ("weighted_swiglu", "weighted_swiglu_back"):
        monkeypatch.setattr(fused_bias_swiglu, name, getattr(fused_experts, name))
    fc1, fc2 = linear_of("column", H, 2 * F), linear_of("row", F, H)
    probs = rows_of(1, torch.float32)
    with recorder.watch_kept():
        y, _ = fc1(rows_of(H), COUNTS)
        h = fused_bias_swiglu.weighted_bias_swiglu_impl(y, None, probs)
        out, _ = fc2(h, COUNTS)
    assert h.dtype == torch.bfloat16
    assert kept_bytes(recorder, [*fc1.parameters(), *fc2.parameters()]) == (
        N * (2 * H + 2 * 2 * F + 4 + 2 * F)
    )
    out.backward(torch.empty_like(out))
    assert probs.grad.shape == (N, 1)
    products = sum(op.flops for op in recorder.ops)
    assert products == 3 * (2 * N * 3 * F * H)
    assert [op.name for op in fused(recorder) if "swiglu" in op.name] == [
        "fused.weighted_swiglu", "fused.weighted_swiglu_backward",
    ]  # fmt: skip


def test_gradients_are_added_where_the_buffer_is(recorder):
    """Fused accumulation reads and writes float32, and leaves autograd a dummy."""
    linear = linear_of("row", F, H, gradient_accumulation_fusion=True)
    for weight in linear.parameters():
        weight.main_grad = torch.empty(weight.shape, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
    out, _ = linear(rows_of(F), COUNTS)
    out.backward(torch.empty_like(out))
    [wgrad] = [op for op in recorder.ops if op.name.endswith("_wgrad")]
    buffer = 4 * E * F * H
    assert (wgrad.bytes_read, wgrad.bytes_written) == (2 * N * (F + H) + buffer, buffer)
    assert wgrad.dtype == "bfloat16"  # of the factors: the peak that counts
    assert all(weight.grad_added_to_main_grad for weight in linear.parameters())


@pytest.mark.parametrize("original", [False, True])
def test_fp8_keeps_one_byte_an_element(recorder, original):
    """The copy by columns and a float32 scale for 128 elements; the input where Megatron asks."""
    linear = linear_of("column", H, F)
    linear.save_original_input = original
    with fp8_autocast(True, Float8BlockScaling()), recorder.watch_kept():
        y, _ = linear(rows_of(H), COUNTS)
    held = [*linear.parameters(), *linear.buffers()]
    assert kept_bytes(recorder, held) == (2 * N * H if original else N * H + 4 * N * H // 128)
    y.backward(torch.empty_like(y))
    products = [op for op in recorder.ops if op.flops]
    assert [op.dtype for op in products] == ["float8_e4m3fn"] * 3
    assert products[0].bytes_read == N * H + E * H * F  # one byte an element, not two
    casts = [op.phase for op in recorder.ops if op.name == "fused.cast_fp8"]
    assert len([phase for phase in casts if phase != "optimizer"]) == 2 + original


def test_fp8_weights_are_cast_once_a_step_and_held(recorder):
    linear = linear_of("column", H, F)
    for first in (True, False, True):
        recorder.ops.clear()
        if first:
            linear.is_first_microbatch = True  # as Megatron does at the start of a step
        with fp8_autocast(True, Float8BlockScaling()):
            linear(rows_of(H), COUNTS)
        cast = [op for op in recorder.ops if op.phase == "optimizer"]
        assert [op.bytes_written for op in cast] == ([2 * E * H * F] if first else [])
    scales = 4 * (-(-E * F // 128) * (H // 128))
    assert sum(buffer.nbytes for buffer in linear.buffers()) == 2 * (E * H * F + scales)


def test_weights_in_fp8_alone_are_two_copies_of_a_byte(recorder):
    """--fp8-param-gather: by rows and by columns, and no parameter in 16 bits beside them."""
    with fp8_model_init(True, Float8BlockScaling()):
        linear = linear_of("column", H, F)
    with fp8_autocast(True, Float8BlockScaling()):
        y, _ = linear(rows_of(H), COUNTS)
        y.backward(torch.empty_like(y))
    [product] = [op for op in recorder.ops if op.name == "fused.grouped_gemm"]
    assert (product.dtype, product.bytes_read) == ("float8_e4m3fn", N * H + E * H * F)
    assert not [op for op in recorder.ops if op.phase == "optimizer"]
    scales = 4 * (-(-F // 128) * (H // 128))
    assert sum(buffer.nbytes for buffer in linear.buffers()) == 2 * E * (H * F + scales)
    assert sum(weight.untyped_storage().nbytes() for weight in linear.parameters()) == 0


def test_rows_are_padded_to_what_fp8_takes(recorder):
    x = rows_of(H)
    padded, counts = RowPadding(16)(x, COUNTS)
    assert counts == [48, 0, 64]
    assert padded.shape == (112, H)
    back = RowUnpadding()(padded, COUNTS)
    back.backward(torch.empty_like(back))
    assert x.grad.shape == (N, H)
    assert [op.name for op in fused(recorder)] == [
        "fused.pad", "fused.unpad", "fused.pad", "fused.unpad",
    ]  # fmt: skip
    assert RowPadding(8)(x, COUNTS)[0] is x


def mone(choose, **changes):
    weights = [torch.empty(E, F, H, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    x, probs = rows_of(H), torch.empty(N, dtype=torch.float32, requires_grad=True)
    output = on_gpu(config_of(), x, probs, COUNTS, *weights, choose=choose, **changes)
    return output, (x, probs, *weights)


def test_mone_keeps_the_chosen_entries(recorder):
    """x, p, of each of N S entries a and u, and the bits of N rows: 4 S + F / 8 bytes a row."""
    with recorder.watch_kept():
        output, (*_, gate, up, down) = mone(Selection(S))
    assert kept_bytes(recorder, [gate, up, down]) == N * (2 * H + 4 + 4 * S + F // 8)
    assert output.mask.kept == S
    assert output.gate_K is output.a_K is None
    assert output.entries is not None


def test_mone_holds_wide_operands_while_it_runs(recorder):
    """Of its kernels one [N, F] forward at a time, three backward, in 16 bits, beside what else is
    made: bits, bases and entries, sums, marks, outputs, and gradients."""
    output, operands = mone(Selection(S))
    words, tiles = -(-F // 32), -(-N // 128) + E
    entries, rows = N * S * 2, 2 * N * H  # one number for each kept entry; y or dx
    before = sum(tensor.nbytes for tensor in operands)
    chosen = N * (4 * words + 2 * words) + entries + N * (4 + 1)
    where = 8 * E + 4 * (2 * (E + 1) + 2 * tiles)  # counts and row map
    assert recorder.live.peaks["forward"] - before == (2 * N * F + chosen + where + entries + rows)
    dy = torch.empty(N, H, dtype=torch.bfloat16)
    recorder.clock.switch("up/down GEMM", "backward")
    held, y_NH = recorder.live.now, output.y_NH
    del output  # and with it what a balance loss would ask for
    bases = N * (2 * words + 4 + 1)  # sums and marks too
    y_NH.backward(dy)
    gradients = sum(tensor.grad.nbytes for tensor in operands)
    kept = N * (4 * S + F // 8)  # let go before the weight gradients, the largest, come
    assert recorder.live.peaks["backward"] - held == 3 * (2 * N * F) + gradients - kept - bases


FORWARD = ["row_map", "gate_product", "select", "up_product", "hidden_product"]
BACKWARD = ["rebuild", "dh_product", "probability_grad", "hidden_product", *["weight_grad"] * 3]


@pytest.mark.parametrize("block", [1, 8])
def test_operations_of_mone_are_the_formulas(recorder, block):
    """Three products of all entries forward, six backward, grouped; the cost model reads rows,
    columns and depth."""
    from megatron_mone.planning.cost.roofline import operation

    output, operands = mone(Selection(S, block=block))
    output.y_NH.backward(torch.empty(N, H, dtype=torch.bfloat16))
    assert all(t.grad.shape == t.shape for t in operands)
    once, ops = 2 * N * H * F, fused(recorder)
    assert [op.name for op in ops] == [f"mone.{name}" for name in FORWARD + BACKWARD]
    products = {"gate_product": 1, "up_product": 1, "dh_product": 1, "weight_grad": 1}
    for op in ops:
        pass_backward = ops.index(op) >= len(FORWARD)
        times = products.get(op.name.removeprefix("mone."), 0)
        if op.name == "mone.hidden_product":
            times = 1 + pass_backward
        assert op.flops == times * once
        assert op.dtype == ("int64" if op.name == "mone.row_map" else op.dtype)
    assert ops[1].phase == "gate GEMM"
    assert {op.phase for op in ops[3:]} == {"up/down GEMM"}
    shapes = {"gate_product": (F, H), "up_product": (F, H), "dh_product": (F, H)}
    for op in (op for op in ops if op.flops):
        priced = operation(op)
        kind = "grouped_wgrad" if op.name == "mone.weight_grad" else "grouped_gemm"
        assert (priced.kind, priced.dtype, priced.kept) == (kind, "bf16", 1.0)
        if op.name == "mone.weight_grad":
            assert (priced.rows, priced.columns, priced.depth) == (F, H, N // E)
            continue
        terms = op.flops // once
        wanted = shapes.get(op.name.removeprefix("mone."), (H, terms * F))
        assert (priced.rows, priced.columns, priced.depth) == (N / E, *wanted)
    if block == 1:
        choice = operation(ops[2])
        words = 4 * -(-F // 32) + 2 * -(-F // 32)
        assert choice.kind == "selection"
        assert choice.bytes == N * (2 * F + 2 * S + words + 4 + 1)


def test_few_rows_without_gradients_are_their_own_launches(recorder):
    """Products whose operands are listed whole: the union of kept neurons is known on a device."""
    from megatron_mone.planning.cost.roofline import operation

    few, neurons = 8 * E, 168  # no whole tiles of 16
    weights = [torch.empty(E, neurons, H, dtype=torch.bfloat16) for _ in range(3)]
    x, probs = torch.empty(few, H, dtype=torch.bfloat16), torch.empty(few)
    on_gpu(config_of(), x, probs, [few, 0, 0], *weights, choose=Selection(S))
    ops = fused(recorder)
    assert [op.name for op in ops] == [
        f"mone.{name}" for name in ("row_map", "decode_gate", "select", "union", "decode_up",
                                    "decode_down", "add_slots")
    ]  # fmt: skip
    for op, (columns, depth) in zip(
        (op for op in ops if op.flops), ((neurons, H), (neurons, H), (H, neurons)), strict=True
    ):
        priced = operation(op)
        assert (priced.kind, priced.rows, priced.columns) == ("grouped_gemm", 8, columns)
        assert (priced.depth, priced.kept, priced.flops) == (depth, 1.0, 2 * few * H * neurons)


@pytest.mark.parametrize("slots", [1, 2])
def test_operations_of_few_blocks_are_of_the_kept_alone(recorder, slots):
    """The gate of all, then eight products of S / F each, over E F / B segments of the rows."""
    from megatron_mone.planning.cost.roofline import operation

    block, once = S // slots, 2 * N * H * F
    output, _ = mone(Selection(S, block=block))
    output.y_NH.backward(torch.empty(N, H, dtype=torch.bfloat16))
    products = [op for op in fused(recorder) if op.flops]
    names = ["gate_product", "up_segments", "hidden_product", "dh_segments", "hidden_product"]
    assert [op.name for op in products] == [
        f"mone.{name}" for name in [*names, *["weight_grad"] * 3]
    ]
    kept = once * S // F
    assert [op.flops for op in products] == [once, kept, kept, kept, 2 * kept, kept, kept, kept]
    each = N * slots / (E * F // block)
    found = [(o.rows, o.columns, o.depth) for o in map(operation, products)]
    assert found == [
        (N / E, F, H), (each, block, H), (each, H, block), (each, block, H), (each, H, 2 * block),
        *[(block, H, each)] * 3,
    ]  # fmt: skip
    [choice] = [op for op in fused(recorder) if op.name == "mone.select_blocks"]
    assert operation(choice).kind == "selection"


def test_gradients_are_added_to_the_buffer_that_is_there(recorder):
    """The kernel reads and writes float32, and no gradient is made beside it."""
    _, operands = mone(Selection(S))
    x, probs, *weights = operands
    main = [torch.empty(weight.shape, dtype=torch.float32) for weight in weights]
    views = [weight.view_as(weight) for weight in weights]
    for view, sink in zip(views, main, strict=True):
        view.grad_sink = lambda sink=sink: sink
    output = on_gpu(config_of(), x, probs, COUNTS, *views, choose=Selection(S))
    output.y_NH.backward(torch.empty(N, H, dtype=torch.bfloat16))
    made = [op for op in fused(recorder) if op.name == "mone.weight_grad"]
    assert len(made) == 3
    for op in made:
        buffer = 4 * E * F * H
        assert (op.bytes_read, op.bytes_written) == (2 * N * (F + H) + buffer, buffer)


def test_a_given_mask_is_not_chosen_again(recorder):
    """A recompute: the gate of all once more, no selection."""
    words = torch.empty(N, -(-F // 32), dtype=torch.int32, device="meta")
    given = NeuronMask.of_words(words, F, kept=S)
    output, _ = mone(given)
    assert output.mask is given
    names = [*FORWARD[:2], "compact", *FORWARD[3:]]
    assert [op.name for op in fused(recorder)] == [f"mone.{name}" for name in names]


def test_a_rule_keeps_the_share_that_the_config_promises(recorder):
    """Its rows may keep different numbers: torch's operators around the same products."""
    seen = []
    output, _ = mone(seen.append)
    assert seen[0].shape == (N, F)
    assert output.mask.num_entries == N * S
    assert output.gate_K.shape == (N * S,)
    names = [op.name for op in fused(recorder) if op.flops]
    assert names == ["mone.gate_product", "mone.gate_product", "mone.hidden_product"]


def test_a_bias_is_repeated_as_known_counts_say(recorder):
    found = []
    rule = BiasedRule(
        lambda gate, bias: found.append(bias), torch.empty(E, F), torch.tensor(COUNTS)
    )
    ask(rule, torch.empty(N, F))
    assert found[-1].shape == (N, F)
    assert recorder.ops[-1].bytes_written == 4 * N * F
    ask(replace(rule, bias_EF=None), torch.empty(N, F))
    assert found[-1] is None


@pytest.mark.parametrize(
    ("changes", "fault"),
    [({"all_gates": True}, "mone_ng_loss_type = 'normalized'"),
     ({"activation": "softmax"}, "mone_activation = 'softmax'")],
)  # fmt: skip
def test_what_only_the_reference_runs_is_one_line(recorder, changes, fault):
    with pytest.raises(ValueError, match=fault) as failure:
        mone(Selection(S), **changes)
    assert "\n" not in str(failure.value)


def test_keeping_all_is_a_number_of_neurons():
    assert keeps_all(config_of(mone_neuron_ratio=1.0))
    assert keeps_all(config_of(mone_neuron_ratio=None, mone_neurons_per_token=F))
    assert not keeps_all(config_of())
    assert not keeps_all(config_of(mone_neuron_ratio=1.0, mone_selection="threshold"))
    assert not keeps_all(SimpleNamespace())


@pytest.mark.parametrize(
    ("name", "value"), [("use_transformer_engine_op_fuser", True), ("mone_replay_masks", "masks")]
)
def test_what_is_not_traced_is_one_line(name, value):
    with (
        pytest.raises(ValueError, match=f"{name} = {value!r} cannot be traced") as failure,
        fused_experts.installed(config_of(**{name: value})),
    ):
        pass
    assert "\n" not in str(failure.value)


LAYERS, TOKENS, TOPK, HIDDEN, WIDTH = 2, 64, 2, 64, 48
JOB = [
    *("--num-layers", f"{LAYERS}", "--hidden-size", f"{HIDDEN}", "--num-attention-heads", "4"),
    *("--num-experts", "8", "--moe-router-topk", f"{TOPK}", "--moe-ffn-hidden-size", f"{WIDTH}"),
    *("--ffn-hidden-size", "96", "--swiglu", "--disable-bias-linear", "--normalization", "RMSNorm"),
    *("--position-embedding-type", "rope", "--untie-embeddings-and-output-weights", "--bf16"),
    *("--seq-length", f"{TOKENS // 2}", "--max-position-embeddings", "32"),
    *("--micro-batch-size", "2", "--global-batch-size", "64", "--lr", "3e-3", "--num-workers", "0"),
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-router-dtype", "fp32", "--transformer-impl", "transformer_engine", "--mock-data"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "127", "--train-iters", "2"),
    *("--moe-grouped-gemm", "--expert-model-parallel-size", "8", "--use-distributed-optimizer"),
]
DEEPEP = [
    *("--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "deepep"),
    *("--moe-permute-fusion", "--moe-router-fusion"),
]
MOE_ACT = ["--recompute-granularity", "selective", "--recompute-modules", "moe_act"]
MONE = ["--mone-neuron-ratio"]


@pytest.fixture(scope="module")
def traced(trace_pools):
    """Traces of rank 0 of eight, by flags beside JOB and DEEPEP."""
    traces = {}

    def of(*flags, rows=None):
        key = flags, rows
        if key not in traces:
            traces[key] = trace_rank(trace_pools, [*JOB, *DEEPEP, *flags], 8, 0, rows)
        return traces[key]

    return of


@pytest.mark.slow
def test_r_1_is_the_dense_moe(traced):
    dense, mone = traced(), traced(*MONE, "1")
    assert mone.ops == dense.ops
    assert mone.collectives == dense.collectives
    assert (mone.memory, mone.rows) == (dense.memory, dense.rows)
    assert not any(op.name.startswith("mone.") for op in mone.ops)
    assert sum(op.count for op in dense.ops if op.name == "fused.grouped_gemm") == 2 * LAYERS


@pytest.mark.slow
def test_traffic_of_a_deepep_job(traced):
    """Hidden states of this rank's tokens each way, and probabilities with a dispatch."""
    hidden, probs = 2 * TOKENS * HIDDEN, 4 * TOKENS * TOPK
    found = [
        (c.kind, c.phase, c.pass_, c.bytes)
        for c in traced().collectives
        if c.group == "tp-ep" and c.ranks == 8
    ]
    assert sorted(found) == sorted(LAYERS * [
        ("dispatch", "dispatch", "forward", hidden + probs),
        ("combine", "combine", "forward", hidden),
        ("dispatch", "combine", "backward", hidden),
        ("combine", "dispatch", "backward", hidden + probs),
    ])  # fmt: skip


@pytest.mark.slow
def test_recomputing_the_activation_drops_exactly_it(traced):
    """[N, F] in 16 bits of each layer; its kernel runs once more, as part of the experts."""
    plain, again = traced(), traced(*MOE_ACT)
    rows = TOKENS * TOPK  # from all 8 ranks, of which this one has an eighth of the experts
    dropped = plain.memory.activations - again.memory.activations
    assert dropped == LAYERS * 2 * rows * WIDTH
    runs = [op for op in again.ops if op.name == "fused.weighted_swiglu"]
    assert sum(op.count for op in runs) == 2 * LAYERS
    assert {(op.phase, op.pass_) for op in runs} == {
        ("up/down GEMM", "forward"), ("up/down GEMM", "recompute"),
    }  # fmt: skip


@pytest.mark.slow
def test_a_hot_rank_and_what_mone_saves_of_its_experts(traced):
    """Expert 0 gets every token; 8 ranks send it theirs. r = 1/4."""
    hot = (64, 16, 8, 8, 8, 8, 8, 8)
    trace = traced(*MONE, "0.25", rows=hot)
    rows = 8 * 64
    assert trace.rows == {1: rows, 2: rows}
    once, products = 2 * rows * HIDDEN * WIDTH, {}
    for op in trace.ops:
        if op.name.startswith("mone.") and op.flops:
            key = op.name, op.pass_
            products[key] = products.get(key, 0) + op.count * op.flops
    assert products == {
        ("mone.gate_product", "forward"): LAYERS * once,
        ("mone.up_product", "forward"): LAYERS * once,
        ("mone.hidden_product", "forward"): LAYERS * once,
        ("mone.dh_product", "backward"): LAYERS * once,
        ("mone.hidden_product", "backward"): LAYERS * 2 * once,
        ("mone.weight_grad", "backward"): LAYERS * 3 * once,
    }
    [permuted] = {op.inputs[0] for op in trace.ops if op.name == "fused.permute"}
    assert permuted == (rows, HIDDEN)  # one expert here: a token that arrives is a row


def test_mone_in_fp8_casts_for_each_product(recorder):
    """Nine products of rows padded by half of what can be, between the kernels of the backend."""
    with fp8_autocast(True, Float8BlockScaling()):
        output, (x, _, gate, *_) = mone(Selection(S))
    output.y_NH.backward(torch.empty_like(output.y_NH))
    ops, padded = fused(recorder), N + E * 8
    once, products = 2 * padded * H * F, [op for op in ops if "grouped_gemm" in op.name]
    assert [(op.name.removeprefix("fused.grouped_gemm"), op.flops) for op in products] == [
        *[("", once)] * 3, *[("_dgrad", once)] * 3, *[("_wgrad", once)] * 3,
    ]  # fmt: skip
    assert {op.dtype for op in products} == {"float8_e4m3fn"}
    assert products[0].bytes_read == padded * H + E * H * F
    assert sum(op.name == "fused.cast_fp8" for op in ops) == 2 * 9
    assert sum(op.name == "fused.pad" for op in ops) == 6 + 6  # of two rows each in _wgrad
    own = [op.name.removeprefix("mone.") for op in ops if op.name.startswith("mone.")]
    assert own == [
        "row_map", "select", "up_entries", "mark_bad", "rebuild", "dh_entries", "probability_grad",
    ]  # fmt: skip
    assert x.grad.shape == (N, H)
    assert gate.grad.shape == (E, F, H)


@pytest.mark.slow
def test_a_job_in_fp8_is_planned_with_its_casts(traced):
    """As many products as in 16 bits, each of 8, but where layers are left in 16."""
    fp8 = (
        *("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--mone-backend", "te"),
        *("--moe-token-dispatcher-type", "alltoall"),
    )
    first = ("--first-last-layers-bf16", "--num-layers-at-start-in-bf16", "1")
    end = ("--num-layers-at-end-in-bf16", "0")
    for flags, layers in ((fp8, LAYERS), ((*fp8, *first, *end), LAYERS - 1)):
        trace = traced(*MONE, "0.25", *flags)
        ran = [op for op in trace.ops if op.name.startswith("fused.grouped_gemm")]
        assert sum(op.count for op in ran) == 9 * layers
        assert {op.dtype for op in ran} == {"float8_e4m3fn"}
        gates = sum(op.count for op in trace.ops if op.name == "mone.gate_product")
        assert gates == LAYERS - layers


@pytest.mark.slow
@pytest.mark.parametrize("model", [(), (*MONE, "0.25")], ids=["stock", "MoNE"])
def test_experts_of_a_latent_width_are_planned_in_it(traced, model):
    """Products and traffic of that width; each token is projected to it and back once."""
    latent = HIDDEN // 4
    trace = traced(*model, "--moe-latent-size", str(latent))
    rows, probs = TOKENS * TOPK, 4 * TOKENS * TOPK
    products = {"mone.gate_product", "fused.grouped_gemm"}
    [flops] = {op.flops for op in trace.ops if op.name in products and op.pass_ == "forward"} - {
        2 * rows * WIDTH * latent * 2  # gate and up of a stock expert are one
    }
    assert flops == 2 * rows * WIDTH * latent
    ways = {c.bytes for c in trace.collectives if c.group == "tp-ep" and c.kind == "dispatch"}
    assert ways == {2 * TOKENS * latent + probs, 2 * TOKENS * latent}
    around = [op for op in trace.ops if op.phase == "latent projection"]
    assert sum(op.count * op.flops for op in around) == LAYERS * 3 * 2 * (
        2 * TOKENS * HIDDEN * latent
    )


@pytest.mark.slow
def test_a_layer_is_planned_as_the_launches_that_it_makes(traced):
    """Check of NaN, counters and balance loss included, as test_no_waits.py counts them."""
    ops = [op for op in traced(*MONE, "0.25").ops if op.name.startswith("mone.")]
    ran = {pass_: [op for op in ops if op.pass_ == pass_] for pass_ in ("forward", "backward")}
    balance = ["note_bad", "statistics", "gather"]
    for pass_, names in (("forward", FORWARD + balance), ("backward", BACKWARD)):
        found = [name for op in ran[pass_] for name in [op.name.removeprefix("mone.")] * op.count]
        assert found == LAYERS * names
    rows = TOKENS * TOPK
    [statistics] = {(op.inputs, op.bytes_read) for op in ops if op.name == "mone.statistics"}
    assert statistics[0][:2] == ((rows, -(-WIDTH // 32)),) * 2


@pytest.mark.slow
def test_experts_that_are_not_grouped_are_refused(trace_pools):
    flags = [flag for flag in JOB if flag != "--moe-grouped-gemm"]
    with pytest.raises(ValueError, match="add --moe-grouped-gemm") as failure:
        trace_rank(trace_pools, [*flags, "--moe-token-dispatcher-type", "alltoall"], 8, 0)
    assert "\n" not in str(failure.value)
