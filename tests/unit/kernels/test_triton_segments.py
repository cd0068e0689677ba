"""Launches of an expert layer by segments (K9), taken down instead of run: without a GPU."""

import pytest
import torch

from megatron_mone.kernels import Selection
from megatron_mone.kernels.triton import masked_experts
from megatron_mone.kernels.triton.launch import Launch, recording

ROWS, HIDDEN, NEURONS = 40, 16, 96


def launches(experts: int, choose: Selection) -> tuple[list[Launch], list[Launch]]:
    """Of the forward and of the backward pass."""
    forward: list[Launch] = []
    backward: list[Launch] = []
    x, p = torch.randn(ROWS, HIDDEN, requires_grad=True), torch.rand(ROWS, requires_grad=True)
    weights = [torch.randn(experts, NEURONS, HIDDEN, requires_grad=True) for _ in range(3)]
    counts = torch.full((experts,), ROWS // experts)
    with recording(forward.append):
        y, _, _ = masked_experts(x, p, counts, *weights, choose=choose, activation="silu")
    with recording(backward.append):
        y.sum().backward()
    return forward, backward


@pytest.mark.parametrize("experts", [2, 8, 40])
@pytest.mark.parametrize(("block", "expected"), [(24, (6, 8)), (12, (7, 9))])
def test_launches_are_few_whatever_the_experts(experts, block, expected):
    """A row of several blocks has its parts added: one launch more in each pass."""
    made = launches(experts, Selection(24, block=block))
    assert tuple(map(len, made)) == expected


@pytest.mark.parametrize("block", [24, 12, 8, 6])
def test_products_are_made_over_kept_blocks_alone(block):
    """But for the gate: N H F (1 + 8 r) multiplications; parts of a row are all that is wider."""
    forward, backward = launches(2, Selection(24, block=block))
    flops = [sum(launch.flops for launch in made) for made in (forward, backward)]
    unit = 2 * ROWS * HIDDEN
    assert flops == [unit * (NEURONS + 2 * 24), unit * 6 * 24]
    written = {tuple(t.shape) for made in (forward, backward) for t in made for t in t.writes}
    wide = {shape for shape in written if len(shape) == 2 and shape[0] * shape[1] > ROWS * 24}
    parts = {(ROWS * 24 // block, HIDDEN)} if block < 24 else set()
    assert wide - {(ROWS, NEURONS)} == parts
    assert sum(tuple(t.shape) == (ROWS, NEURONS) for made in backward for t in made.writes) == 0
