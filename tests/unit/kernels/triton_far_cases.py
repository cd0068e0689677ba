"""Kernels on rows and of experts whose elements lie past 2^31 of their tensors: as at the start.

Tensors of many GiB are asked for, and but a few pages of them touched. A launch by rows starts at
the first row that is there.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from megatron_mone.kernels import Selection
from megatron_mone.kernels.triton import launch as launches
from megatron_mone.kernels.triton import masked_experts, ops, segments
from megatron_mone.kernels.triton.decode import DecodeProducts
from megatron_mone.kernels.triton.row_map import RowMap
from tests.unit.kernels.triton_case_tools import case, unpoisoned

HIDDEN, NEURONS, KEPT, ROWS, TILE = 128, 256, 128, 5, 16
FAR = 2**31 // KEPT + 3  # of rows of S and H elements; of F, 2^32
BY_ROWS = {
    "select": 1, "compact": 1, "rebuild": 1, "mark_bad": 1, "select_blocks": 1,
    "probability_grad": 64,
}  # fmt: skip
"""Rows of a program, of kernels launched by rows."""


@contextmanager
def from_row(first: int):
    """Launches of one program for so many rows begin at the one of row `first`."""
    launch, stripe = launches.launch, ops.STRIPE_ROWS

    def near(kernel, grid, *args, **kwargs):
        rows = BY_ROWS.get(kernel.split(".")[1])
        if rows is None:
            return launch(kernel, grid, *args, **kwargs)
        ahead = first // rows
        interpreter_builder.set_grid_idx = lambda x, y, z: setattr(
            interpreter_builder, "grid_idx", (x + ahead, y, z)
        )
        try:
            return launch(kernel, (grid[0] - ahead,), *args, **kwargs)
        finally:
            del interpreter_builder.set_grid_idx

    ops.launch, ops.STRIPE_ROWS = near, 2**40  # one stripe: rows before the first are nobody's
    try:
        yield
    finally:
        ops.launch, ops.STRIPE_ROWS = launch, stripe


def rows_at(first: int) -> RowMap:
    """ROWS rows of one expert, and none before."""
    ends = torch.tensor([first, first + ROWS], dtype=torch.int32)
    tile = torch.zeros(1, dtype=torch.int32)
    return RowMap(ends, ends, tile, tile + first, first + ROWS, 1, TILE)


def at(first: int, rows: Tensor) -> Tensor:
    """The rows, from row `first` of a tensor that holds nothing else."""
    wide = rows.new_empty((first + ROWS, *rows.shape[1:]))
    wide[first:] = rows
    return wide


def sorted_pairs(first: int, unit_M: Tensor) -> segments.Segments:
    """Rows that keep one block each, sorted by it: in the first segment, or the second."""
    order, of_first = unit_M.argsort(stable=True), int((unit_M == 0).sum())
    starts = torch.tensor([first, first + of_first, first + ROWS], dtype=torch.int32)
    tiles = torch.arange(2, dtype=torch.int32)
    where = RowMap(starts, starts, tiles, starts[:2].contiguous(), first + ROWS, 1, TILE)
    return segments.Segments(at(first, (first + order).int()), where, 1)


def results(first: int, block: int) -> list[Tensor]:
    """What each kernel makes of the rows; with blocks of S those of segments."""
    torch.manual_seed(0)
    where = rows_at(first)
    x, dy, p = (
        at(first, rows.bfloat16())
        for rows in (torch.randn(ROWS, HIDDEN), torch.randn(ROWS, HIDDEN), torch.rand(ROWS))
    )
    gate, up, down = (torch.randn(1, NEURONS, HIDDEN).bfloat16() / 8 for _ in range(3))
    a = ops.gate_product(x, gate, where)
    entries = ops.select(a, Selection(KEPT, block=block), "silu", where)
    one, blocks = torch.ones(()), ops.Blocks(torch.zeros(1, dtype=torch.int32), 1, 1)
    slope = ops.Slope(torch.rand(1, NEURONS), blocks, True, 1.0, lambda: one)
    bases, dg = ops.rebuild(entries.words_NW, entries.a_NS, slope, "silu", where)
    kept = ops.Kept(entries.a_NS, entries.a_NS, entries.words_NW, bases)
    dw = torch.empty(1, NEURONS, HIDDEN)
    whole = [dw]
    if block > 1:
        found = sorted_pairs(first, (entries.words_NW[first:, 0] == 0).int())
        u, h = segments.up_product(x, up, p, entries.a_NS, found, "silu")
        y = segments.hidden_product(where, (h, down), bad_N=entries.bad_N)
        kept = kept._replace(u_NS=u)
        *made, dp = segments.dh_product(dy, down, p, kept, dg, found, "silu", where)
        da, du, _ = made
        dx = segments.hidden_product(where, (da, gate), (du, up))
        segments.weight_grad(da, x, dw, False)
        by_rows = [value.of_PB for value in (h, *made)]
    else:
        again = ops.compact(a, entries.words_NW, KEPT, "silu", where)
        u, h = ops.up_product(x, up, p, entries, "silu", where)
        y = ops.hidden_product(where, (h, down), bad_N=entries.bad_N)
        ops.mark_bad(y, entries.bad_N, where)
        kept = kept._replace(u_NS=u)
        *by_rows, dp = ops.dh_product(dy, down, p, kept, dg, "silu", where)
        da, du, _ = by_rows
        dx = ops.hidden_product(where, (da, gate), (du, up))
        ops.weight_grad(da, x, dw, False, where)
        by_rows += [again.a_NS, h]
        sums = ops.block_sums(
            entries, blocks, where, neurons=NEURONS, activation="silu", shares=True,
            scale_free=True,
        )  # fmt: skip
        whole.append(sums.sums_BX)
    by_rows += [a, *entries, u, y, bases, dg, dp, dx]
    return [*(tensor[first:] for tensor in by_rows), *whole]


@case(1)
@case(KEPT)
def far_rows_are_as_near_ones(block: int) -> None:
    with unpoisoned(), from_row(FAR):
        far = results(FAR, block)
    near = results(0, block)
    for number, (one, other) in enumerate(zip(far, near, strict=True)):
        assert torch.equal(one, other), number


COUNTS, NARROW = [2, 0, 1, 2], 64
STRIDE = 2**30 + 64  # elements from expert to expert: the third lies past 2^31


def apart(weights: Tensor, stride: int) -> Tensor:
    """The same experts, so far from each other in a tensor that holds nothing else."""
    experts, neurons, hidden = weights.shape
    space = weights.new_empty((experts - 1) * stride + neurons * hidden)
    view = space.as_strided((experts, neurons, hidden), (stride, hidden, 1))
    return view.copy_(weights)


@case(False)
@case(True)
def far_experts_are_as_near_ones(trained: bool) -> None:
    """Of few rows (decode) and of rows that are trained; weights read, their gradients written."""
    x, dy = (torch.randn(sum(COUNTS), HIDDEN).bfloat16() for _ in range(2))
    p = torch.rand(sum(COUNTS))
    near = [(torch.randn(len(COUNTS), NARROW, HIDDEN) / 8).bfloat16() for _ in range(3)]
    v = torch.randn(sum(COUNTS), NARROW).bfloat16()

    def made(weights: list[Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_(trained)
        with torch.set_grad_enabled(trained):
            y, mask, entries = masked_experts(
                leaf, p, torch.tensor(COUNTS), *weights, choose=Selection(16), activation="silu"
            )
        assert isinstance(entries.call.products, DecodeProducts) != trained
        if not trained:
            return [y, mask.to_bool()]
        dw = torch.zeros_like(weights[0]) if weights is near else apart(near[0] * 0, STRIDE)
        ops.weight_grad(v, x, dw, False, entries.where)
        return [y, mask.to_bool(), *torch.autograd.grad(y, leaf, dy), dw]

    with unpoisoned():
        far = made([apart(weights, STRIDE) for weights in near])
        for number, (one, other) in enumerate(zip(far, made(near), strict=True)):
            assert torch.equal(one, other), number
