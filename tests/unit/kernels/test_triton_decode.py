"""Launches of few rows without gradients (D1 to D3), taken down instead of run: without a GPU."""

import pytest
import torch

from megatron_mone.kernels import Selection
from megatron_mone.kernels.triton import masked_experts
from megatron_mone.kernels.triton.decode import DecodeProducts
from megatron_mone.kernels.triton.launch import Launch, recording
from megatron_mone.kernels.triton.products import KernelProducts, SegmentProducts

HIDDEN, NEURONS = 16, 96


def launches(rows: int, experts: int, choose: Selection, wants: bool = False):
    """(launches, products) of a forward pass."""
    made: list[Launch] = []
    x, p = torch.randn(rows, HIDDEN, requires_grad=wants), torch.rand(rows)
    weights = [torch.randn(experts, NEURONS, HIDDEN) for _ in range(3)]
    counts = torch.tensor([rows, *[0] * (experts - 1)])
    with recording(made.append):
        _, _, kept = masked_experts(x, p, counts, *weights, choose=choose, activation="silu")
    return made, type(kept.call.products)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("block", [1, 24])
def test_launches_are_few_whatever_the_experts(rows, experts, block):
    made, _ = launches(rows, experts, Selection(24, block=block))
    names = [one.kernel.partition(".")[2] for one in made]
    choice = "select" if block == 1 else "select_blocks"
    assert names == [
        "row_map", "decode_gate", choice, "union", "decode_up", "decode_down", "add_slots",
    ]  # fmt: skip


def test_it_is_of_few_rows_and_no_gradients():
    """At most eight rows an expert; else, and where something wants gradients, the others."""
    single, one_block = Selection(24), Selection(24, block=24)
    for rows, choose, wants, kind in (
        (16, single, False, DecodeProducts), (17, single, False, KernelProducts),
        (16, one_block, False, DecodeProducts), (17, one_block, False, SegmentProducts),
        (16, single, True, KernelProducts), (16, one_block, True, SegmentProducts),
    ):  # fmt: skip
        assert launches(rows, 2, choose, wants)[1] is kind
    with torch.no_grad():
        assert launches(16, 2, single, True)[1] is DecodeProducts
    with torch.inference_mode():
        assert launches(16, 2, single, True)[1] is DecodeProducts


def test_a_launch_lists_weights_whole():
    """The union is known on the device alone: operands and operations are bounds."""
    rows, experts = 4, 2
    made, _ = launches(rows, experts, Selection(24))
    products = [one for one in made if one.flops]
    assert {one.flops for one in products} == {2 * rows * HIDDEN * NEURONS}
    weight = (experts, NEURONS, HIDDEN)
    assert [weight in {tuple(t.shape) for t in one.reads} for one in products] == [True] * 3
    assert tuple(made[-2].writes[0].shape) == (rows, 4, HIDDEN)
