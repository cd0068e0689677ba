"""Operators of a trace as calls: what runs has the shapes recorded, and every kind has a call."""

from unittest.mock import patch

import pytest
import torch

from megatron_mone.benchmarking.node_times.arguments import call_of
from megatron_mone.benchmarking.node_times.clock import windows
from megatron_mone.benchmarking.node_times.links import groups_of
from megatron_mone.benchmarking.node_times.operators import Operators
from megatron_mone.kernels.cpu.shares import GateSums
from megatron_mone.planning.fitting.node_times import (
    ATTENTION,
    CHOICE,
    COPY,
    EXPERTS,
    GROUPED,
    ITSELF,
    PRODUCT,
)
from megatron_mone.planning.tracing.stand_ins.gate_sums import ROW_SUMS, SHARE_SUMS, SLOPES
from megatron_mone.planning.tracing.trace import Op

CPU = torch.device("cpu")
SPEND = 0.001


def op(name, inputs, outputs, dtype="float32", flops=0, read=None) -> Op:
    entries = sum(torch.Size(shape).numel() for shape in inputs)
    read = 4 * entries if read is None else read
    written = 4 * sum(torch.Size(shape).numel() for shape in outputs)
    return Op(name, tuple(inputs), tuple(outputs), dtype, read, written, flops, "other", "forward")


ITSELVES = [
    op("aten.mm", [(8, 4), (4, 2)], [(8, 2)], flops=128),
    op("aten.bmm", [(3, 8, 4), (3, 4, 2)], [(3, 8, 2)], flops=384),
    op("aten.baddbmm", [(3, 8, 2), (3, 8, 4), (3, 4, 2)], [(3, 8, 2)], flops=384),
    op("aten.mul", [(8, 2), (8, 1)], [(8, 2)]),
    op("aten.mul", [(8, 2)], [(8, 2)]),
    op("aten.add_", [(8,), (8,)], [(8,)]),
    op("aten.sum", [(4, 2, 6)], [(4,)]),
    op("aten.sum", [(1, 2)], [(2,)]),
    op("aten.mean", [(4, 2, 6)], [(4, 2, 1)]),
    op("aten.sum", [(4, 2)], [()]),
    op("aten.max", [(4, 6)], [(4,), (4,)]),
    op("aten.cat", [(2, 3), (4, 3)], [(6, 3)]),
    op("aten.stack", [(3,), (3,)], [(2, 3)]),
    op("aten.index", [(9, 3), (20,)], [(20, 3)]),
    op("aten.index_add_", [(9, 3), (20,), (20, 3)], [(9, 3)]),
    op("aten.gather", [(8, 6), (8, 2)], [(8, 2)]),
    op("aten.scatter_add_", [(4, 3), (9, 3), (9, 3)], [(4, 3)]),
    op("aten.embedding", [(16, 3), (2, 5)], [(2, 5, 3)]),
    op("aten.embedding_dense_backward", [(2, 5, 3), (2, 5)], [(16, 3)]),
    op("aten.masked_fill", [(2, 3), (2, 1)], [(2, 3)]),
    op("aten._softmax", [(4, 6)], [(4, 6)]),
    op("aten._softmax_backward_data", [(4, 6), (4, 6)], [(4, 6)]),
    op("aten.topk", [(4, 6)], [(4, 2), (4, 2)]),
    op("aten.sort", [(12,)], [(12,), (12,)], "bool", read=12),
    op("aten.repeat_interleave", [(4,)], [(10,)], "int64"),
    op("aten._to_copy", [(4,)], [(4,)], "bfloat16"),
    op("aten.zeros", [], [(7,)]),
    op("aten.slice_backward", [(2, 3)], [(2, 9)]),
    op("aten.lerp_", [(4,), (4,)], [(4,)]),
    op("aten.eq", [(4,)], [(4,)], "bool"),
    op("aten.linalg_vector_norm", [(4, 3)], [()]),
]
EXPERT = (op("mone.gate", [(12, 8), (2, 16, 8)], [(48,), (48,), (48,), (13,)], flops=3072),
          op("mone.up_down", [(12, 8), (12,), (2, 16, 8), (2, 16, 8), (48,), (48,), (13,)],
             [(12, 8), (48,)], flops=1536),
          op("mone.up_down_backward",
             [(12, 8), (12, 8), (12,), *[(2, 16, 8)] * 3, (48,), (48,), (48,), (13,)],
             [(12, 8), (12,), *[(2, 16, 8)] * 3], flops=4608))  # fmt: skip
STAND_INS = [
    (op("fused.linear", [(8, 4), (2, 4)], [(8, 2)], flops=128), PRODUCT),
    (op("fused.grouped_gemm", [(8, 4), (2, 4, 6)], [(8, 6)], flops=384), GROUPED),
    (op("fused.attention", [(8, 1, 4, 2), (8, 1, 2, 2), (8, 1, 2, 2)], [(8, 1, 8)], flops=512),
     ATTENTION),
    (op("fused.attention_backward", [(8, 1, 4, 2), (8, 1, 2, 2), (8, 1, 2, 2)], [(8, 1, 4, 2)],
        flops=512), ATTENTION),
    (op("mone.select", [(8, 6)], [(8, 2)]), CHOICE),
    (op("fused.adam", [(64,), (64,)], [(64,)]), COPY),
]  # fmt: skip


@pytest.mark.parametrize("one", ITSELVES, ids=lambda one: f"{one.name} {one.inputs}")
def test_torchs_operators_run_themselves(one):
    call = call_of(one, CPU)
    assert call is not None
    made = call()
    first = made[0] if isinstance(made, tuple | list) else made
    assert tuple(first.shape) == one.outputs[0]
    assert str(first.dtype).removeprefix("torch.") == one.dtype or one.name == "aten.sort"


def test_an_index_of_xs_own_shape_is_a_mask():
    """Of integers it would name 6 rows of x, 24 entries each, and write 6 times as many."""
    call = call_of(op("aten.index_put_", [(2, 3, 4), (2, 3), ()], [(2, 3, 4)]), CPU)
    assert call().shape == (2, 3, 4)
    call = call_of(op("aten.index_put", [(2, 3, 4), (2, 3), (9, 4)], [(2, 3, 4)]), CPU)
    assert call is None  # as many values as a mask could never hold


def test_what_repeats_in_place_neither_grows_nor_vanishes():
    call = call_of(op("aten.mul_", [(4,), (4,)], [(4,)]), CPU)
    for _ in range(1000):
        made = call()
    assert made.tolist() == [1.0] * 4


@pytest.mark.parametrize(("one", "by"), STAND_INS, ids=lambda one: getattr(one, "name", one))
def test_fused_kernels_have_stand_ins(one, by):
    seconds, found = Operators(CPU, 1, SPEND).time(one)
    assert found == by
    assert seconds > 0


def test_the_experts_parts_are_of_both_their_passes():
    meter = Operators(CPU, 1, SPEND)
    seconds = {}
    for one in EXPERT:
        seconds[one.name], by = meter.time(one)
        assert by == EXPERTS
    assert seconds["mone.gate"] / seconds["mone.up_down"] == pytest.approx(2.0)  # by operations
    [(forward, backward)] = meter._experts.values()
    assert seconds["mone.gate"] + seconds["mone.up_down"] == pytest.approx(forward)
    assert seconds["mone.up_down_backward"] == backward > 0


def test_an_unknown_operator_is_a_copy_and_a_product_in_8_bits_is_refused():
    assert Operators(CPU, 1, SPEND).time(op("aten.no_such_one", [(4,)], [(4,)]))[1] == COPY
    assert Operators(CPU, 1, SPEND).time(op("aten.silu", [(4,)], [(4,)]))[1] == ITSELF
    with pytest.raises(ValueError, match="float8_e4m3fn, which is not timed"):
        Operators(CPU, 1, SPEND).time(
            op("fused.linear", [(8, 4), (2, 4)], [(8, 2)], "float8_e4m3fn", 128)
        )


def test_groups_stand_side_by_side_and_the_rest_is_in_none():
    assert groups_of(2, 1, 5) == [range(0, 2), range(2, 4)]
    assert [list(one) for one in groups_of(2, 2, 4)] == [[0, 2], [1, 3]]
    assert [list(one) for one in groups_of(2, 2, 9)] == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_calls_are_taken_in_turn():
    made: list[int] = []
    assert windows([lambda: made.append(0), lambda: made.append(1)], SPEND, lambda _often: 4) > 0
    assert made.count(0) - made.count(1) in (0, 1)


def test_torch_looks_up_no_overload():
    """Of a scatter that takes a hundred times as long as the scatter, and a tensor is tried as a
    list of Python's numbers."""
    with patch.object(torch._ops.OpOverloadPacket, "__call__", side_effect=AssertionError):
        call = call_of(op("aten.scatter", [(8, 4), (8, 2), (8, 2)], [(8, 4)]), CPU)
        assert call().shape == (8, 4)
        assert call_of(op("aten.mul_", [(4,)], [(4,)]), CPU) is not None


@pytest.mark.parametrize("name", [ROW_SUMS, SHARE_SUMS, SLOPES])
def test_sums_over_gates_are_those_of_the_kernels(name, monkeypatch):
    """At the shapes of the trace, with weights and totals where it has them."""
    called = []
    for one in ("row_sums", "share_sums", "slopes"):
        monkeypatch.setattr(
            GateSums, one, lambda self, *given, one=one: called.append((one, self.rows, given))
        )
    entries = [(12,), (12,), (5,), (4,)]
    more = {ROW_SUMS: [(2, 8)], SHARE_SUMS: [(4,)], SLOPES: [(2, 8), (4,), (4,)]}[name]
    Operators(CPU, 1, 1e-4).time(op(name, [*entries, *more], [(2, 8)]))
    which, rows, given = called[0]
    assert which == name.removeprefix("mone.").replace("share_slopes", "slopes")
    assert rows == 4
    shapes = [tuple(one.shape) for one in given if isinstance(one, torch.Tensor)]
    assert shapes == more
