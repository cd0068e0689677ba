"""Stand-ins of fused layers: what they keep for backward, multiply, move and send.

Shapes: s positions, b sequences, h width, n heads, g key-value heads, d head size, F neurons.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_mone.common.phases import OPTIMIZER
from megatron_mone.planning.tracing.recorder import KeptBytes, Recorder
from megatron_mone.planning.tracing.stand_ins import fp8 as fused_precision
from megatron_mone.planning.tracing.stand_ins import layers as fused_layers
from megatron_mone.planning.tracing.stand_ins import op as fused_op
from megatron_mone.planning.tracing.stand_ins.attention import (
    AttentionJob,
    DotProductAttention,
    score_pairs,
)
from megatron_mone.planning.tracing.stand_ins.cross_entropy import native_cross_entropy
from megatron_mone.planning.tracing.stand_ins.layernorm import LayerNorm, RMSNorm
from megatron_mone.planning.tracing.stand_ins.layers import apply_rotary_pos_emb
from megatron_mone.planning.tracing.stand_ins.linear import (
    LayerNormLinear,
    Linear,
    linear_of_megatron,
)
from megatron_mone.planning.tracing.stand_ins.optimizers import (
    FusedAdam,
    multi_tensor_applier,
    multi_tensor_l2norm,
    multi_tensor_scale,
)
from megatron_mone.planning.tracing.unknown_values import UnknownValues
from megatron_mone.profiling.clock import HostStamps, PhaseClock

S, B, H, HEADS, D, F = 6, 2, 32, 4, 8, 48
BF16, FP32 = 2, 4
ROWS = S * B
RECIPES = {
    # bytes of the scales of an activation [rows, columns]
    "DelayedScaling": lambda rows, columns: 4,
    "Float8CurrentScaling": lambda rows, columns: 4,
    "Float8BlockScaling": lambda rows, columns: 4 * rows * -(-columns // 128),
    "MXFP8BlockScaling": lambda rows, columns: rows * -(-columns // 32),
}


class Group:
    """A process group of `ranks`, of which this is the first."""

    def __init__(self, ranks):
        self._ranks = ranks

    def size(self):
        return self._ranks

    def rank(self):
        return 0


@pytest.fixture
def recorder():
    recorder = Recorder(PhaseClock(HostStamps()))
    recorder.clock.begin()
    with fused_op.recording(recorder), UnknownValues(recorder.saw_operator):
        yield recorder


@pytest.fixture
def sent(monkeypatch):
    """[(kind, bytes put in)] of collectives on `Group`s."""
    found = []

    def note(kind, position):
        def collective(*args, **kwargs):
            found.append((kind, args[position].nbytes))

        return collective

    for name, kind, position in (
        ("all_gather_into_tensor", "all_gather", 1),
        ("reduce_scatter_tensor", "reduce_scatter", 1),
        ("all_reduce", "all_reduce", 0),
        ("all_to_all_single", "all_to_all", 1),
        ("isend", "send", 0),
        ("irecv", "recv", 0),
    ):
        monkeypatch.setattr(dist, name, note(kind, position))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(group.size())))
    return found


@contextmanager
def fp8(name="Float8BlockScaling"):
    with fused_precision.fp8_autocast(True, getattr(fused_precision, name)()):
        yield


def activation(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def kept_bytes(recorder, function, *ignored):
    """(result, bytes that autograd keeps of it), without those of `ignored` tensors."""
    with recorder.watch_kept():
        result = function()
    out = {tensor.untyped_storage()._cdata for tensor in ignored}
    return result, sum(size for key, size in recorder.kept() if key not in out)


def ops(recorder, name):
    return [op for op in recorder.ops if op.name == name]


def linear(kind=Linear, inputs=H, outputs=F, **names):
    options = {"bias": False, "params_dtype": torch.bfloat16, "device": "cpu", **names}
    return kind(inputs, outputs, **options)


def give_main_grads(module, dtype=torch.float32):
    for parameter in module.parameters():
        parameter.main_grad = torch.empty(parameter.shape, dtype=dtype)
        parameter.grad_added_to_main_grad = False


def run(recorder, module, x, *more):
    """(kept without weights, op names of the backward pass)."""
    y, kept = kept_bytes(recorder, lambda: module(x, *more), *module.parameters())
    recorder.ops.clear()
    torch.autograd.backward(y, torch.empty_like(y))
    return kept


class TestLinear:
    def test_keeps_its_input_and_has_three_products(self, recorder):
        module, x = linear(), activation(S, B, H)
        y, kept = kept_bytes(recorder, lambda: module(x), *module.parameters())
        assert y.shape == (S, B, F)
        assert kept == ROWS * H * BF16
        y.backward(torch.empty_like(y))
        names = ("fused.linear", "fused.linear_dgrad", "fused.linear_wgrad")
        shapes = {
            "fused.linear": ((ROWS, H), (F, H), (ROWS, F)),
            "fused.linear_dgrad": ((ROWS, F), (F, H), (ROWS, H)),
            "fused.linear_wgrad": ((ROWS, F), (ROWS, H), (F, H)),
        }
        assert [op.name for op in recorder.ops] == list(names)
        for op in recorder.ops:
            assert (*op.inputs, *op.outputs) == shapes[op.name]
            assert op.flops == 2 * ROWS * H * F
            assert op.dtype == "bfloat16"
            assert op.bytes_read + op.bytes_written == BF16 * (ROWS * H + H * F + ROWS * F)
        assert x.grad.shape == x.shape
        assert module.weight.grad.shape == (F, H)

    def test_adds_its_weight_gradient_to_the_buffer(self, recorder):
        module = linear(fuse_wgrad_accumulation=True)
        give_main_grads(module)
        run(recorder, module, activation(S, B, H))
        [wgrad] = ops(recorder, "fused.linear_wgrad")
        assert module.weight.grad_added_to_main_grad
        assert wgrad.bytes_written == F * H * FP32
        assert wgrad.bytes_read == BF16 * ROWS * (H + F) + F * H * FP32  # what is there is added to

    def test_a_bias_is_read_and_gets_a_gradient(self, recorder):
        module = linear(bias=True)
        run(recorder, module, activation(S, B, H))
        assert module.bias.grad.shape == (F,)
        deferred = linear(bias=True, return_bias=True)
        y, bias = deferred(activation(S, B, H))
        assert bias is deferred.bias
        assert y.shape == (S, B, F)

    def test_the_layer_norm_before_it(self, recorder):
        for name, statistics, weights in (("RMSNorm", 1, 1), ("LayerNorm", 2, 2)):
            recorder._kept = KeptBytes()
            module = linear(LayerNormLinear, normalization=name)
            kept = run(recorder, module, activation(S, B, H))
            # input and normalised input in 16 bits, statistics of rows in 32
            assert kept == 2 * ROWS * H * BF16 + statistics * ROWS * FP32
            norms = [p for key, p in module.named_parameters() if "layer_norm" in key]
            assert len(norms) == weights
            assert all(p.grad.shape == (H,) for p in norms)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_fp8_keeps_one_byte_an_element(self, recorder, recipe):
        width = 160  # more than a block, and no whole ones
        module, x = linear(inputs=width), activation(S, B, width)
        with fp8(recipe):
            kept = run(recorder, module, x, True)
            assert kept == ROWS * width + RECIPES[recipe](ROWS, width)
            recorder._kept = KeptBytes()
            normed = linear(LayerNormLinear, width, normalization="RMSNorm")
            kept = run(recorder, normed, x, True)
        rstd = ROWS * FP32
        assert kept == ROWS * width * BF16 + rstd + ROWS * width + RECIPES[recipe](ROWS, width)
        assert len(ops(recorder, "fused.cast_fp8")) == 1  # of dy; the others were forward

    def test_fp8_products_are_fp8_and_casts_are_ops(self, recorder):
        module, x = linear(), activation(S, B, H)
        with fp8("Float8CurrentScaling"):
            y = module(x, is_first_microbatch=True)
            weight_cast, cast, product = recorder.ops
            assert (cast.name, product.name) == ("fused.cast_fp8", "fused.linear")
            assert cast.bytes_read == ROWS * H * BF16
            assert cast.bytes_written == 2 * (ROWS * H + FP32)  # by rows and by columns
            assert weight_cast.phase == OPTIMIZER
            assert weight_cast.bytes_written == 2 * (F * H + FP32)
            assert product.dtype == "float8_e4m3fn"
            assert product.bytes_written == ROWS * F * BF16
            module(x, is_first_microbatch=False)
            assert len(ops(recorder, "fused.cast_fp8")) == 3  # the weight's copies are kept
        y.backward(torch.empty_like(y))
        assert ops(recorder, "fused.linear_dgrad")[0].dtype == "float8_e4m3fn"
        assert ops(recorder, "fused.linear_wgrad")[0].dtype == "float8_e4m3fn"

    def test_fp8_copies_of_weights_are_buffers_only_if_cached(self, recorder):
        module, x = linear(), activation(S, B, H)
        with fp8("Float8CurrentScaling"):
            module(x, is_first_microbatch=None)
            assert list(module.buffers()) == []
            module(x, is_first_microbatch=True)
        assert sum(buffer.nbytes for buffer in module.buffers()) == 2 * (F * H + FP32)

    def test_the_original_input_is_kept_where_megatron_asks(self, recorder):
        module = linear()
        module.save_original_input = True
        with fp8():
            assert run(recorder, module, activation(S, B, H), True) == ROWS * H * BF16
        assert len(ops(recorder, "fused.cast_fp8")) == 2  # of dy, and of the input now


class TestTensorParallel:
    @pytest.mark.parametrize("sequence_parallel", [True, False])
    def test_column(self, recorder, sent, sequence_parallel):
        names = {"tp_group": Group(4), "tp_size": 4, "sequence_parallel": sequence_parallel}
        module = linear(parallel_mode="column", **names)
        x = activation(S, B, H)
        kept = run(recorder, module, x)
        assert module.weight.shape == (F // 4, H)
        assert (module.weight.tensor_model_parallel, module.weight.partition_dim) == (True, 0)
        part = ROWS * H * BF16
        assert kept == part  # gathered again in backward
        if sequence_parallel:
            assert sent == [
                ("all_gather", part),
                ("all_gather", part),
                ("reduce_scatter", 4 * part),
            ]
            assert ops(recorder, "fused.linear_wgrad")[0].flops == 2 * 4 * ROWS * H * F // 4
        else:
            assert sent == [("all_reduce", part)]
        assert x.grad.shape == x.shape

    @pytest.mark.parametrize("sequence_parallel", [True, False])
    def test_row(self, recorder, sent, sequence_parallel):
        names = {"tp_group": Group(4), "tp_size": 4, "sequence_parallel": sequence_parallel}
        module = linear(parallel_mode="row", bias=True, return_bias=True, **names)
        x = activation(4 * S, B, H // 4)
        y, _ = module(x)
        y.backward(torch.empty_like(y))
        assert module.weight.shape == (F, H // 4)
        assert module.weight.partition_dim == 1
        assert module.bias.sequence_parallel is sequence_parallel
        whole = 4 * ROWS * F * BF16
        if sequence_parallel:
            assert y.shape == (S, B, F)
            assert sent == [("reduce_scatter", whole), ("all_gather", whole // 4)]
        else:
            assert y.shape == (4 * S, B, F)
            assert sent == [("all_reduce", whole)]

    def test_fp8_is_gathered_in_fp8_with_the_scales_of_its_blocks(self, recorder, sent):
        names = {"tp_group": Group(4), "tp_size": 4, "sequence_parallel": True}
        for recipe, scales in (("Float8CurrentScaling", 0), ("Float8BlockScaling", 4 * ROWS)):
            sent.clear()
            with fp8(recipe):
                run(recorder, linear(parallel_mode="column", **names), activation(S, B, H), True)
            assert [size for kind, size in sent if kind == "all_gather"] == [ROWS * H + scales] * 2

    def test_one_rank_sends_nothing(self, recorder, sent):
        names = {"tp_group": Group(1), "tp_size": 1, "sequence_parallel": True}
        for mode in ("column", "row"):
            run(recorder, linear(parallel_mode=mode, **names), activation(S, B, H))
        assert sent == []

    def test_the_output_layer(self, recorder, sent):
        weight = torch.nn.Parameter(torch.empty(F, H, dtype=torch.bfloat16))
        weight.main_grad = torch.empty(F, H)
        weight.grad_added_to_main_grad = False
        x = activation(S, B, H)
        with fp8():  # 16 bits all the same
            y, kept = kept_bytes(
                recorder,
                lambda: linear_of_megatron(x, weight, None, True, False, True, None, 0, Group(2)),
                weight,
            )
        with recorder.watch_kept():  # its hooks hand out other tensors than they were given
            y.backward(torch.empty_like(y))
        assert kept == ROWS * H * BF16
        assert y.shape == (2 * S, B, F)
        assert weight.grad_added_to_main_grad
        assert {op.dtype for op in recorder.ops} == {"bfloat16"}
        assert [kind for kind, _ in sent] == ["all_gather", "all_gather", "reduce_scatter"]


def test_fused_linear_weight_is_one_storage_fp8_alone(recorder):
    """--fp8-param-gather: 1 byte by rows, moved to where Megatron gathers, 1 by columns."""
    from megatron_mone.planning.tracing.stand_ins import quantized_weight as fused_weight

    with fused_precision.fp8_model_init(True, fused_precision.Float8BlockScaling()):
        module = linear()
    weight = module.weight
    assert isinstance(weight, fused_weight.QuantizedTensor)
    assert isinstance(weight, torch.nn.Parameter)
    assert (weight.dtype, weight.shape) == (torch.bfloat16, (F, H))
    assert weight.untyped_storage().nbytes() == 0
    assert sum(b.nbytes for b in module.buffers()) == 2 * (F * H + FP32)
    module.bfloat16()  # as Megatron does, which must leave them 8 bits wide
    assert sum(b.nbytes for b in module.buffers()) == 2 * (F * H + FP32)
    moved = torch.empty(2 * F * H, dtype=torch.uint8, device="meta")[: F * H].view(F, H)
    fused_weight.replace_raw_data(weight, moved)
    assert weight.copies()[0].data.untyped_storage()._cdata == moved.untyped_storage()._cdata
    with fp8():
        run(recorder, module, activation(S, B, H), True)
    assert not any(op.phase == OPTIMIZER for op in recorder.ops)  # nothing is cast
    assert weight.grad.shape == (F, H)


def test_fused_fp8_weights_are_cast_by_shards(recorder, sent):
    from megatron_mone.planning.tracing.stand_ins import quantized_weight as fused_weight

    def built(recipe):
        with fused_precision.fp8_model_init(True, recipe):
            return linear(inputs=256, outputs=256)

    layers = [built(fused_precision.Float8BlockScaling()) for _ in range(2)]
    weights = [layer.weight for layer in layers]
    shard = torch.empty(1000, dtype=torch.float32)
    fused_weight.cast_master_weights_to_fp8(weights, [None, shard], [None, 0], Group(8))
    [cast] = recorder.ops
    assert (cast.bytes_read, cast.bytes_written) == (4000, 1000)
    assert sent == [("all_reduce", 2 * 4 * FP32)]  # of 2 x 2 blocks of 128 x 128 each
    fused_weight.post_all_gather_processing(weights)
    assert recorder.ops[-1].bytes_written == 2 * 256 * 256
    sent.clear()
    other = built(fused_precision.MXFP8BlockScaling())
    fused_weight.cast_master_weights_to_fp8([other.weight], [None], [None], Group(8))
    assert sent == []


class TestNorm:
    @pytest.mark.parametrize(("kind", "statistics"), [(RMSNorm, 1), (LayerNorm, 2)])
    def test_keeps_input_and_statistics(self, recorder, kind, statistics):
        module = kind(H, sequence_parallel=True, params_dtype=torch.bfloat16, device="cpu")
        kept = run(recorder, module, activation(S, B, H))
        assert kept == ROWS * H * BF16 + statistics * ROWS * FP32
        assert [op.name for op in recorder.ops] == [f"fused.{kind.kind}_backward"]
        assert all(p.sequence_parallel and p.grad is not None for p in module.parameters())

    def test_reads_and_writes_each_row_once(self, recorder):
        module = RMSNorm(H, sequence_parallel=False, params_dtype=torch.bfloat16, device="cpu")
        module(activation(S, B, H))
        [op] = recorder.ops
        assert op.bytes_read == BF16 * (ROWS * H + H)
        assert op.bytes_written == BF16 * ROWS * H + FP32 * ROWS


def attention(heads=HEADS, groups=HEADS, size=D, values=D, **names):
    """(module, q, k, v)."""
    module = DotProductAttention(heads, size, attn_mask_type="causal", **names)
    return (
        module,
        activation(S, B, heads, size),
        activation(S, B, groups, size),
        activation(S, B, groups, values),
    )


class TestAttention:
    @pytest.mark.parametrize(("groups", "size", "values"), [(4, 8, 8), (2, 8, 8), (4, 12, 8)])
    def test_keeps_operands_output_and_statistics(self, recorder, groups, size, values):
        module, q, k, v = attention(groups=groups, size=size, values=values)
        out, kept = kept_bytes(recorder, lambda: module(q, k, v))
        assert out.shape == (S, B, HEADS * values)
        operands = ROWS * (HEADS * size + groups * (size + values)) * BF16
        assert kept == operands + ROWS * HEADS * values * BF16 + ROWS * HEADS * FP32
        out.backward(torch.empty_like(out))
        assert [t.grad.shape for t in (q, k, v)] == [t.shape for t in (q, k, v)]
        forward, backward = recorder.ops
        # Half of the products S^2: two forward; backward three of the key's size, two of the
        # value's.
        half = 2 * B * HEADS * S * S // 2
        assert forward.flops == half * (size + values)
        assert backward.flops == half * (3 * size + 2 * values)
        assert forward.inputs == ((S, B, HEADS, size), (S, B, groups, size), (S, B, groups, values))

    def test_masks(self):
        assert score_pairs(10, causal=False, window=None) == 100
        assert score_pairs(10, causal=True, window=None) == 50
        # 4 positions at most: the triangle of 10 less that of 6, the same in whole tiles
        assert score_pairs(10, causal=True, window=4) == 50 - 18
        assert score_pairs(10, causal=True, window=99) == 50

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_a_ring_sends_keys_and_values_and_their_gradients(self, recorder, sent, ranks):
        module, q, k, v = attention(groups=2, cp_group=Group(ranks), cp_comm_type="p2p")
        out, kept = kept_bytes(recorder, lambda: module(q, k, v))
        kv = ROWS * 2 * 2 * D * BF16
        assert [size for kind, size in sent if kind == "send"] == [kv] * (ranks - 1)
        sent.clear()
        out.backward(torch.empty_like(out))
        found = [size for kind, size in sent if kind == "send"]
        assert sum(found) == 2 * (ranks - 1) * kv  # keys and values, and their gradients
        assert len(found) == ranks
        assert kept == ROWS * HEADS * 2 * D * BF16 + kv + ROWS * HEADS * FP32
        # the rank's share of the whole sequence
        assert recorder.ops[0].flops == 2 * B * HEADS * (S * ranks) ** 2 // 2 * 2 * D // ranks

    def test_gathered_keys_and_values(self, recorder, sent):
        module, q, k, v = attention(cp_group=Group(2), cp_comm_type="all_gather")
        out = module(q, k, v)
        part = ROWS * HEADS * D * BF16
        assert sent == [("all_gather", part)] * 2
        out.backward(torch.empty_like(out))
        assert sent[2:] == [("all_gather", part)] * 2 + [("reduce_scatter", 2 * part)] * 2

    def test_heads_for_positions(self, recorder, sent):
        module, q, k, v = attention(groups=2, cp_group=Group(2), cp_comm_type="a2a")
        out = module(q, k, v)
        query, key = ROWS * HEADS * D * BF16, ROWS * 2 * D * BF16
        assert out.shape == (S, B, HEADS * D)
        assert sent == [("all_to_all", size) for size in (query, key, key, query)]
        out.backward(torch.empty_like(out))
        assert sent[4:] == [("all_to_all", size) for size in (query, query, key, key)]
        assert recorder.ops[0].inputs[0] == (2 * S, B, HEADS // 2, D)

    def test_heads_in_a_node_and_a_ring_of_nodes(self, recorder, sent):
        groups = [Group(2), Group(4)]
        module, q, k, v = attention(groups=2, cp_group=groups, cp_comm_type="a2a+p2p")
        out = module(q, k, v)
        query, key = ROWS * HEADS * D * BF16, ROWS * 2 * D * BF16
        exchanged = [("all_to_all", size) for size in (query, key, key)]
        ring = [(kind, 2 * key) for _ in range(3) for kind in ("send", "recv")]
        assert sent == [*exchanged, *ring, ("all_to_all", query)]
        assert recorder.ops[0].inputs[0] == (2 * S, B, HEADS // 2, D)
        del sent[:]
        out.backward(torch.empty_like(out))
        back = [2 * key, 4 * key, 4 * key, 2 * key]  # keys and values; gradients behind; home
        ring = [(kind, size) for size in back for kind in ("send", "recv")]
        home = [("all_to_all", size) for size in (query, key, key)]
        assert sent == [("all_to_all", query), *ring, *home]
        assert q.grad.shape == q.shape
        assert k.grad.shape == k.shape

    @pytest.mark.parametrize(
        ("names", "fault"),
        [
            ({"softmax_type": "learnable"}, "softmax_type = 'learnable'"),
            ({"attn_mask_type": "no_mask", "window_size": (4, 4)}, "window_size"),
        ],
    )
    def test_what_is_not_modelled_is_refused_in_one_line(self, names, fault):
        with pytest.raises(ValueError, match=fault) as failure:
            DotProductAttention(4, 8, **{"attn_mask_type": "causal", **names})
        assert "\n" not in str(failure.value)

    def test_one_rank_of_context_parallelism_is_none(self):
        assert AttentionJob(True, None).ranks == 1


class TestBetweenLayers:
    def test_swiglu_reads_both_halves(self, recorder):
        y, dout = torch.empty(ROWS, 2 * F), torch.empty(ROWS, F)
        out = fused_layers._activation("swiglu")(y)
        dy = fused_layers._activation_backward("swiglu")(dout, y)
        assert (out.shape, dy.shape) == (dout.shape, y.shape)
        forward, backward = recorder.ops[-2:]
        assert (forward.name, backward.name) == ("fused.swiglu", "fused.swiglu_backward")
        assert forward.bytes_read + forward.bytes_written == 3 * ROWS * F * FP32
        assert backward.bytes_read + backward.bytes_written == 5 * ROWS * F * FP32

    @pytest.mark.parametrize(("prob", "mask"), [(0.0, 0), (0.1, ROWS * H)])
    def test_dropout_keeps_one_byte_an_element(self, recorder, prob, mask):
        x, residual = activation(S, B, H), activation(S, B, H)
        out, kept = kept_bytes(
            recorder, lambda: fused_layers._bias_dropout_add((x, None), residual, prob)
        )
        assert kept == mask
        out.backward(torch.empty_like(out))
        assert len(ops(recorder, "fused.bias_dropout_add_backward")) == (prob > 0)
        assert x.grad.shape == residual.grad.shape == x.shape

    def test_an_fp32_residual_stays_fp32(self, recorder):
        x, residual = activation(S, B, H), activation(S, B, H, dtype=torch.float32)
        bias = activation(H)
        out = fused_layers._bias_dropout_add((x, bias), residual, 0.0)
        out.backward(torch.empty_like(out))
        assert out.dtype == residual.grad.dtype == torch.float32
        assert x.grad.dtype == torch.bfloat16
        assert bias.grad.shape == (H,)

    def test_rope_keeps_angles_alone(self, recorder):
        t, angles = activation(S, B, HEADS, D), torch.empty(S, 1, 1, D, dtype=torch.float32)
        out, kept = kept_bytes(recorder, lambda: apply_rotary_pos_emb(t, angles))
        assert kept == S * D * FP32
        out.backward(torch.empty_like(out))
        assert t.grad.shape == t.shape
        assert [op.name for op in recorder.ops] == ["fused.rope"] * 2
        packed = activation(S * B, HEADS, D)  # documents are turned like samples
        assert apply_rotary_pos_emb(packed, angles, tensor_format="thd").shape == packed.shape
        assert recorder.ops[-1].outputs == (tuple(packed.shape),)

    def test_ropes_of_latent_attention(self, recorder):
        nope, rope, value = 8, 4, 6
        cos, sin = (torch.empty(S, 1, 1, rope, dtype=torch.bfloat16) for _ in range(2))
        q = activation(S, B, HEADS, nope + rope) * 1
        kv, shared = activation(S, B, HEADS, nope + value), activation(S, B, 1, rope)
        recorder.ops.clear()
        turned = fused_layers._rope_for_q(q, cos, sin, nope, rope)
        assert turned.untyped_storage()._cdata == q.untyped_storage()._cdata  # in place
        (key, val), kept = kept_bytes(
            recorder, lambda: fused_layers._rope_for_kv(kv, shared, cos, sin, rope, nope, value)
        )
        assert kept == 2 * S * rope * BF16
        assert (key.shape[-1], val.shape[-1]) == (nope + rope, value)
        torch.autograd.backward([key, val], [torch.empty_like(key), torch.empty_like(val)])
        assert (kv.grad.shape, shared.grad.shape) == (kv.shape, shared.shape)
        of_q, of_kv, _ = recorder.ops
        assert of_q.bytes_written == ROWS * HEADS * rope * BF16
        assert of_kv.bytes_written == ROWS * HEADS * (nope + rope + value) * BF16

    def test_cross_entropy_keeps_the_softmax_in_fp32(self, recorder, sent):
        logits = activation(S, B, 100)
        labels = torch.zeros(S, B, dtype=torch.int64)
        loss, kept = kept_bytes(recorder, lambda: native_cross_entropy(logits, labels, Group(2)))
        assert loss.shape == (S, B)
        assert kept == ROWS * (100 * FP32 + 1 + 8)  # the mask of targets, the targets
        assert sent == [("all_reduce", ROWS * FP32), ("all_reduce", 2 * ROWS * FP32)]
        loss.backward(torch.empty_like(loss))
        assert logits.grad.dtype == torch.bfloat16
        assert recorder.ops[-1].bytes_written == ROWS * 100 * BF16


class TestOptimizer:
    @pytest.mark.parametrize(
        ("options", "bytes_each"),
        [
            ({}, 8),
            ({"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}, 4),
            ({"master_weights": True}, 8 + 4),
            ({"master_weights": True, "store_param_remainders": True}, 8 + 2),
        ],
    )
    def test_state(self, recorder, options, bytes_each):
        parameter = torch.nn.Parameter(torch.empty(10, 3, dtype=torch.bfloat16))
        adam = FusedAdam([parameter], use_decoupled_grad=True, **options)
        parameter.decoupled_grad = torch.empty(10, 3)
        adam.step()
        state = adam.state[parameter]
        assert sum(tensor.nbytes for tensor in state.values()) == 30 * bytes_each
        [op] = recorder.ops
        assert op.name == "fused.adam"
        assert op.bytes_written == 30 * (bytes_each + 2)
        assert op.bytes_read == op.bytes_written + 30 * 4  # and the gradient
        adam.step()
        assert adam.state[parameter]["exp_avg"] is state["exp_avg"]

    def test_8_bit_moments_have_a_scale(self, recorder):
        parameter = torch.nn.Parameter(torch.empty(30))
        parameter.grad = torch.empty(30)
        adam = FusedAdam([parameter], exp_avg_sq_dtype=torch.uint8)
        adam.step()
        assert sum(t.nbytes for t in adam.state[parameter].values()) == 30 * (4 + 1) + 4

    def test_parameters_without_gradients_are_left_alone(self, recorder):
        adam = FusedAdam([torch.nn.Parameter(torch.empty(30))])
        adam.step()
        assert not adam.state
        assert recorder.ops == []

    def test_lists_of_tensors_are_one_op(self, recorder):
        tensors = [torch.empty(5), torch.empty(7, dtype=torch.bfloat16)]
        flag = torch.zeros(1, dtype=torch.int)
        recorder.ops.clear()
        norm, _ = multi_tensor_applier(multi_tensor_l2norm, flag, [tensors], False)
        multi_tensor_applier(multi_tensor_scale, flag, [tensors, tensors], 0.5)
        l2, scale = recorder.ops
        assert norm.shape == (1,)
        assert (l2.name, l2.inputs, l2.bytes_read) == ("fused.l2_norm", ((12,),), 34)
        assert (scale.bytes_read, scale.bytes_written) == (34, 34)


def test_nothing_is_taken_down_while_nobody_listens():
    recorder = Recorder(PhaseClock(HostStamps()))
    with UnknownValues(recorder.saw_operator):
        linear()(activation(S, B, H))
        with fused_op.recording(recorder):  # a clock that stands
            linear()(activation(S, B, H))
    assert recorder.ops == []


def test_fp4_is_refused():
    with pytest.raises(ValueError, match="nvfp4"):
        fused_precision.NVFP4BlockScaling()


def test_fused_names_of_a_module_that_others_set(recorder):
    """Megatron sets a group that it knows later than the module."""
    module = linear(parallel_mode="column", tp_size=2, sequence_parallel=True)
    group = SimpleNamespace(size=lambda: 2)
    module.set_tensor_parallel_group(group)
    assert module.tp_group is group
