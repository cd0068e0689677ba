"""Operators as the roofline sees them: shapes of products, kept shares, files of efficiencies."""

import weakref
from dataclasses import replace

import pytest
import torch

from megatron_mone.planning.cost.bands import FittedRun
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.roofline import DEFAULTS, operation
from megatron_mone.planning.tracing.recorder import KeptBytes, LiveBytes
from megatron_mone.planning.tracing.trace import Op
from tests.unit.planning.made_jobs import EXACT


def op(name, inputs, outputs, flops, dtype="bfloat16"):
    return Op(name, inputs, outputs, dtype, 100, 50, flops, "other", "forward")


def test_a_linear_layer_is_one_product_of_all_its_rows():
    one = operation(op("fused.linear", ((7, 2, 32), (48, 32)), ((7, 2, 48),), 2 * 14 * 32 * 48))
    assert (one.kind, one.rows, one.columns, one.depth) == ("gemm", 14, 48, 32)
    assert one.bytes == 150


def test_what_multiplies_nothing_moves_bytes():
    assert operation(op("aten.add", ((4,),), ((4,),), 0)).kind == "memory"
    assert operation(op("mone.select", ((4, 8),), ((4, 2),), 0)).kind == "selection"
    for name in ("fused.permute", "fused.unpermute_backward", "fused.sort_chunks"):
        assert operation(op(name, ((4, 8),), ((8, 8),), 0)).kind == "permutation"


def test_attention_has_queries_keys_and_head_size():
    qkv = ((128, 1, 8, 64), (256, 1, 2, 64), (256, 1, 2, 64))
    one = operation(op("fused.attention", qkv, ((128, 1, 512),), 10**9))
    assert (one.kind, one.rows, one.columns, one.depth) == ("attention", 128, 256, 64)


def test_a_grouped_product_has_the_rows_of_one_expert():
    forward = op("fused.grouped_gemm", ((60, 32), (4, 32, 48)), ((60, 48),), 2 * 60 * 32 * 48)
    one = operation(forward)
    assert (one.kind, one.rows, one.columns, one.depth) == ("grouped_gemm", 15, 48, 32)
    weights = op("fused.grouped_gemm_wgrad", ((60, 32), (60, 48)), ((4, 32, 48),), 2 * 60 * 32 * 48)
    two = operation(weights)
    assert (two.rows, two.columns, two.depth) == (32, 48, 15)


@pytest.mark.parametrize(("name", "products"), [("mone.up_down", 2), ("mone.up_down_backward", 6)])
def test_sparse_products_say_which_share_is_kept(name, products):
    rows, experts, neurons, hidden, kept = 60, 4, 48, 32, 12
    flops = products * 2 * rows * kept * hidden
    weights = (experts, neurons, hidden)
    one = operation(op(name, ((rows, hidden), (rows,), weights, weights), ((rows, hidden),), flops))
    assert one.kind == "grouped_gemm"
    assert one.kept == pytest.approx(kept / neurons)
    assert (one.rows, one.columns, one.depth) == (15, 48, 32)


def test_a_type_without_units_is_refused():
    with pytest.raises(ValueError, match=r"aten.mm multiplies in int8"):
        operation(op("aten.mm", ((2, 2), (2, 2)), ((2, 2),), 16, "int8"))


def test_efficiencies_read_back(tmp_path):
    path = tmp_path / "efficiency.json"
    given = replace(
        EXACT, kernel_seconds=3e-6, source="a profile of 4 ranks",
        runs=(FittedRun("a run", (2.0, 0.5), 0.03),), numbers=1, memory_errors=(0.01,),
    )  # fmt: skip
    given.write(path)
    assert Efficiency.read(path) == given
    assert Efficiency().curves == DEFAULTS


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"kernel_seconds": 3e-06', '"kernel_seconds": -1', "kernel_seconds"),
        ('"gemm"', '"jemm"', "'jemm' is no kind of operation"),
        ('"source"', '"sauce"', "no field 'source'"),
        ("efficiency/3", "efficiency/2", "schema"),
    ],
)
def test_a_damaged_file_of_efficiencies_is_one_line(tmp_path, old, new, fault):
    path = tmp_path / "efficiency.json"
    replace(EXACT, kernel_seconds=3e-6).write(path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=fault) as failure:
        Efficiency.read(path)
    assert str(path) in str(failure.value)


def test_an_efficiency_without_a_curve_is_refused():
    with pytest.raises(ValueError, match="no curve for attention"):
        Efficiency({kind: curve for kind, curve in DEFAULTS.items() if kind != "attention"})


def test_live_bytes_follow_tensors_views_and_freed_storage():
    now = ["forward"]
    live = LiveBytes(lambda: now[0])
    with live.watching_sizes():
        first = torch.empty(10, device="meta")
        live.note(first)
        view = first.view(2, 5)
        live.note(view)  # the same storage
        second = torch.empty(100, device="meta")
        live.note(second)
        second.untyped_storage().resize_(0)
        assert live.now == 40
        now[0] = "backward"
        second.untyped_storage().resize_(400)
        del second, first
        assert live.now == 40  # the view holds it
        del view
    assert live.now == 0
    assert live.peaks == {"forward": 440, "backward": 440}


def test_kept_bytes_are_those_at_last_and_hold_nothing():
    kept = KeptBytes()
    first, second = torch.empty(10, device="meta"), torch.empty(100, device="meta")
    for tensor in (first, first.view(2, 5), second):
        kept.note(tensor.untyped_storage())
    second.untyped_storage().resize_(0)
    kept.resized(second.untyped_storage())
    assert [size for _, size in kept.found()] == [40, 0]
    gone = weakref.ref(first.untyped_storage())
    del first, tensor
    assert gone() is None
    assert [size for _, size in kept.found()] == [40, 0]


def test_attention_is_slower_with_few_heads_and_short_sequences():
    curve = replace(DEFAULTS["attention"], half_grid=8192.0)

    def share(queries, heads):
        shape = (queries, 1, heads, 128)
        one = op("fused.attention", (shape, shape, shape), (shape,), 2 * queries * queries * heads)
        return curve.compute_efficiency(operation(one))

    assert operation(op("fused.attention_backward", ((4, 2, 3, 8), (4, 2, 3, 8)), (), 1)).heads == 6
    assert share(4096, 2) / share(4096, 6) == pytest.approx((1 / 2) / (3 / 4))
    assert share(512, 48) / share(8192, 3) == pytest.approx((512 / 768) / (8192 / 8448))


def test_attention_is_slower_with_heads_wider_than_its_kernels_are_made_for():
    curve = replace(DEFAULTS["attention"], half_depth=0.0, wide_loss=0.5)

    def share(size):
        shape = (4096, 1, 8, size)
        one = operation(op("fused.attention", (shape, shape, shape), (shape,), 10**9))
        return curve.compute_efficiency(one)

    assert share(64) == share(128)
    assert share(192) / share(128) == pytest.approx((128 / 192) ** 0.5)
