"""Blocks of neurons by segments (K9), against torch and the reference in float64.

Cases of triton_interpreter_cases.py, which runs them.
"""

import torch
from torch import Tensor

from megatron_mone.kernels import Selection
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.neuron_selection import NeuronSelector
from megatron_mone.kernels.triton import masked_experts, ops
from megatron_mone.kernels.triton.products import KernelProducts, SegmentProducts, our_products
from megatron_mone.kernels.triton.row_map import row_map
from megatron_mone.kernels.triton.segments import segments_of
from tests.unit.kernels.triton_case_tools import against_reference, case, close, inputs


def blocks_mask(rows: int, neurons: int, block: int, slots: int) -> NeuronMask:
    """Random blocks, the first one in most rows: its segment has several tiles."""
    score_NB = torch.rand(rows, neurons // block)
    score_NB[: rows - 2, 0] += 1
    kept_NB = score_NB >= score_NB.topk(slots, dim=1).values[:, -1:]
    return NeuronMask.from_bool(kept_NB.repeat_interleave(block, dim=1), block, slots * block)


@case([3, 0, 34], 88, 22, 1, 2)
@case([20, 1], 64, 16, 2, 0)
@case([0, 0], 48, 4, 3, 3)
def pairs_are_sorted(counts: list[int], neurons: int, block: int, slots: int, spare: int) -> None:
    """Every pair once, by segment and then by row; tiles hold every place once."""
    rows = sum(counts)
    where = row_map(torch.tensor(counts), rows + spare)
    mask = blocks_mask(rows + spare, neurons, block, slots)
    a_NF = torch.randn(rows + spare, neurons)
    entries = ops.compact(a_NF, mask.words(), slots * block, "relu", where)
    made = segments_of(entries.words_NW, entries.bases_NW, block, slots, neurons, where)
    kept_NB = mask.to_bool()[:rows, ::block]
    units = neurons // block
    slot_NB = kept_NB.cumsum(1) - 1
    want, offsets, row = [], [0], 0
    for count in counts:
        for unit in range(units):
            found = [n for n in range(row, row + count) if kept_NB[n, unit]]
            want += [n * slots + int(slot_NB[n, unit]) for n in found]
            offsets.append(len(want))
        row += count
    assert made.order_P[: rows * slots].tolist() == want
    assert made.where.offsets_E1.tolist() == offsets
    seen: list[int] = []
    tiles = zip(made.where.tile_expert_T.tolist(), made.where.tile_row_T.tolist(), strict=True)
    for segment, place in tiles:
        assert 0 <= segment <= len(counts) * units
        if segment < len(counts) * units:
            end = min(place + where.tile, offsets[segment + 1])
            assert offsets[segment] <= place < end
            seen += range(place, end)
    assert sorted(seen) == list(range(rows * slots))


@case([3, 0, 2], 24, 64, Selection(16, block=16), "silu", torch.float32, 2)
@case([1, 2], 21, 88, Selection(22, block=22), "gelu", torch.float32, 0)
@case([2, 1], 16, 88, Selection(44, block=22), "relu", torch.float32, 3)
@case([2, 1], 16, 64, Selection(32, block=16), "squared_relu", torch.float32, 1)
@case([1, 1], 16, 64, Selection(32, groups=2, block=8), "sigmoid", torch.float32, 0)
@case([1], 8, 288, Selection(144, block=144), "silu", torch.float32, 0)
@case([0, 0], 8, 12, Selection(4, block=4), "silu", torch.float32, 0)
@case([4, 3], 32, 128, Selection(64, block=64), "silu", torch.bfloat16, 1)
@case([2, 3], 32, 96, Selection(48, block=24), "silu", torch.bfloat16, 0)
def segments(counts, hidden, neurons, choose, activation, dtype, spare) -> None:
    """Values, gradients and mask, with rows of no expert. Kept for backward beside the weights: x,
    p, a, u and the bits. The mask given back makes the same bits."""
    leaves, rows = inputs(counts, hidden, neurons, dtype, spare), sum(counts) + spare
    saved: list[Tensor] = []
    made: list[Tensor] = []

    def run(x, p, n, *w):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.append(t), t)[1], lambda t: t
        ):
            y, mask, entries = masked_experts(
                x, p, torch.tensor(n), *w, choose=choose, activation=activation
            )
        assert isinstance(entries.call.products, SegmentProducts)
        made.append(y)
        return y, mask

    mask = against_reference(run, leaves, counts, activation, spare)
    kept, words, real = choose.kept, -(-neurons // 32), sum(counts)
    shapes = sorted(tuple(t.shape) for t in saved if t.dim() < 3)
    assert shapes == sorted([(rows,), (rows, hidden), *[(rows, kept)] * 2, (rows, words)]), shapes
    again, _, _ = masked_experts(
        *leaves[:2], torch.tensor(counts), *leaves[2:], choose=mask, activation=activation
    )
    assert torch.equal(again[:real], made[0][:real])
    if dtype == torch.float32 and rows:
        parts = zip(leaves[0].detach()[:real].split(counts), leaves[2].detach(), strict=True)
        gate_NF = gate_activation(activation, torch.cat([x @ w.t() for x, w in parts]))
        rule = NeuronSelector("topk", kept, kept, 0.0, choose.groups, choose.block)
        assert torch.equal(mask.to_bool()[:real], rule(gate_NF))


COUNTS = [2, 0, 36]  # a weight gradient takes steps of 32 rows


def of_many_rows(block: int):
    """(leaves, an expert of theirs): several tiles of a segment, in S = 24 of F = 48."""
    mask = blocks_mask(sum(COUNTS), 48, block, 24 // block)

    def run(x, p, _counts, *w):
        return masked_experts(x, p, torch.tensor(COUNTS), *w, choose=mask, activation="silu")

    return inputs(COUNTS, 16, 48, torch.float32), run


@case(24)
@case(12)
def segments_of_many_rows(block: int) -> None:
    """Values and gradients; bad rows are marked."""
    leaves, run = of_many_rows(block)
    against_reference(lambda *operands: run(*operands)[:2], leaves, COUNTS, "silu")
    x, p, *w = (t.detach() for t in leaves)
    x[1], w[2][2, :, 3] = torch.inf, torch.nan
    assert run(x, p, COUNTS, *w)[2].bad_N.tolist() == [0, 1, *[1] * 36]


@case()
def segment_gradients_go_where_they_are_wanted() -> None:
    """Into main_grad, added to what is there; and later, on demand: the same bits."""
    leaves, run = of_many_rows(24)
    dy = torch.randn(38, 16)

    def weight_grads(sinks: bool, put_off: bool) -> list[Tensor]:
        x, p, *w = leaves
        views, main = [t.view_as(t) for t in w], [torch.full(t.shape, 0.5) for t in w]
        later: list = []
        for view, into in zip(views, main, strict=True):
            if sinks:
                view.grad_sink = lambda into=into: into
        if put_off:
            views[0].grad_later = later
        y, _, _ = run(x, p, COUNTS, *views)
        made = torch.autograd.grad(y, (x, p, *views), dy, allow_unused=True)[2:]
        made = [g for make in later for g in make()] if put_off else list(made)
        return main if sinks else made

    plain, into = weight_grads(False, True), weight_grads(True, False)
    for grad, main in zip(plain, into, strict=True):
        close(main - 0.5, grad, torch.float32)
    for first, second in zip(into, weight_grads(True, True), strict=True):
        assert torch.equal(first, second)


@case()
def few_blocks_go_by_segments() -> None:
    """One neuron, and more blocks than pay, take the dense products."""
    where = row_map(torch.tensor([1]), 1)
    for choose, kind in (
        (Selection(4), KernelProducts), (Selection(1), KernelProducts),
        (Selection(20, block=4), KernelProducts), (Selection(16, block=4), SegmentProducts),
    ):  # fmt: skip
        assert type(our_products(choose, where, "silu")) is kind
