"""The Triton kernels against torch, in Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.triton_interpreter_cases OUT.json [CASE...]

Writes {case: "" or its traceback}. Its own process, as the interpreter must be chosen before the
kernels are imported. Not run on a GPU: this checks what is computed, not how fast. Memory that the
wrappers get is filled with NaN first. The interpreter truncates where a GPU rounds to bfloat16,
which the bfloat16 tolerances allow for.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from megatron_mone.kernels import Selection
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.neuron_selection import NeuronSelector
from megatron_mone.kernels.triton import masked_experts, ops
from megatron_mone.kernels.triton import row_map as rows_of
from megatron_mone.kernels.triton.row_map import row_map
from tests.unit.kernels import (
    triton_balance_cases,  # noqa: F401  (they register their CASES)
    triton_decode_cases,  # noqa: F401
    triton_far_cases,  # noqa: F401
    triton_layer_cases,  # noqa: F401
    triton_public_cases,  # noqa: F401
    triton_segment_cases,  # noqa: F401
    triton_two_four_cases,  # noqa: F401
)
from tests.unit.kernels.triton_case_tools import (
    BOTH,
    CASES,
    against_reference,
    case,
    close,
    inputs,
    poison,
    quicken_interpreter,
    run_all,
)


@case([3, 0, 34], 40)
@case([0, 0], 0)
@case([[2, 0, 1], [0, 0, 0], [1, 60, 5]], 69)
def rows_are_mapped(counts, rows: int) -> None:
    """Offsets by expert and source; tiles hold every row once, and name expert E past the last."""
    counts = torch.tensor(counts)
    where = row_map(counts, rows)
    totals = counts if counts.dim() == 1 else counts.sum(dim=1)
    offsets = [0, *totals.cumsum(0).tolist()]
    assert where.offsets_E1.tolist() == offsets
    assert where.chunk_offsets_C1.tolist() == [0, *counts.flatten().cumsum(0).tolist()]
    tiles = zip(where.tile_expert_T.tolist(), where.tile_row_T.tolist(), strict=True)
    seen: list[int] = []
    for expert, row in tiles:
        if expert < len(totals):
            end = min(row + where.tile, offsets[expert + 1])
            assert offsets[expert] <= row < end
            seen += range(row, end)
    assert sorted(seen) == list(range(offsets[-1]))


# Selection: exact, so compared bit for bit with the torch selector.


def same_selection(a_NF: Tensor, choose: Selection, activation: str = "relu", spare: int = 0):
    """Bits, bases, entries and sums; `spare` rows at the end are of no expert."""
    rows, neurons = a_NF.shape
    where = row_map(torch.tensor([rows - spare]), rows)
    made = ops.select(a_NF, choose, activation, where)
    gate_NF = gate_activation(activation, a_NF)
    rule = NeuronSelector("topk", choose.kept, choose.kept, 0.0, choose.groups, choose.block)
    want_NF = rule(gate_NF)
    want_NF[rows - spare :] = False
    mask = NeuronMask.of_words(made.words_NW, neurons)
    assert torch.equal(mask.to_bool(), want_NF)
    real = slice(0, rows - spare)
    words_NW = made.words_NW[real].long() & 0xFFFFFFFF
    counts_NW = ((words_NW[:, :, None] >> torch.arange(32)) & 1).sum(dim=2)
    assert torch.equal(made.bases_NW[real].long(), counts_NW.cumsum(1) - counts_NW)
    torch.testing.assert_close(
        made.a_NS[real].flatten(), a_NF[want_NF], rtol=0, atol=0, equal_nan=True
    )
    total_N = gate_NF.abs().double().masked_fill(~want_NF, 0).sum(dim=1)[real]
    finite_N = total_N.isfinite()
    close(made.total_N[real][finite_N], total_N[finite_N], a_NF.dtype)
    assert not made.bad_N[real].any()
    again = ops.compact(a_NF, made.words_NW, choose.kept, activation, where)
    for first, second in zip(made, again, strict=True):
        torch.testing.assert_close(first[real], second[real], equal_nan=True)


@case(12, 3, 1, 1)
@case(1, 1, 1, 1)
@case(1408, 352, 1, 1)
@case(100, 100, 1, 1)
@case(127, 31, 1, 1)
@case(96, 24, 2, 1)
@case(96, 48, 24, 1)
@case(90, 6, 6, 1)
@case(96, 48, 1, 16)
@case(96, 48, 3, 8)
@case(88, 22, 1, 22)
@case(90, 60, 3, 5)
@case(192, 64, 1, 64)
@case(100, 100, 1, 50)
@case(36, 12, 2, 3)
def selection(neurons: int, kept: int, groups: int, block: int) -> None:
    """Random values, then few distinct ones (ties), in both types."""
    choose = Selection(kept, groups, block)
    same_selection(torch.randn(2, neurons), choose, "silu")
    for dtype in BOTH:  # the interpreter truncates a gate to bfloat16: no sigma there
        same_selection(torch.randn(2, neurons).to(dtype), choose)
        same_selection(torch.randint(0, 3, (2, neurons)).to(dtype), choose)


@case()
def selection_special() -> None:
    """Zeros, NaN, infinities, subnormals, rows of no expert; all negative, which relu makes 0."""
    for dtype in BOTH:
        same_selection(torch.full((2, 37), -1.0, dtype=dtype), Selection(9), spare=1)
        # The interpreter flushes the subnormals of bfloat16.
        special = torch.tensor([0.0, 1e-39 if dtype == torch.float32 else 0.5, 1.0])
        value = special[torch.randint(0, 3, (4, 50))].to(dtype)
        value[0, 40] = torch.nan
        value[1, ::3] = torch.nan
        value[2, 5], value[2, 6] = torch.inf, torch.inf
        value[3] = torch.nan
        for kept in (1, 17):
            same_selection(value, Selection(kept))
        same_selection(value, Selection(20, 2, 5), "sigmoid")
        same_selection(torch.full((2, 33), -1.0, dtype=dtype), Selection(6, block=3), spare=1)


@case()
def selection_wide() -> None:
    """Rows too wide to be held whole, with ties across stretches."""
    same_selection(torch.randn(1, 9001), Selection(2000))
    same_selection(torch.randint(0, 2, (1, 12_289)).bfloat16(), Selection(11_000))


@case("sigmoid")
@case("gelu")
@case("relu")
@case("squared_relu")
def selection_by_activation(activation: str) -> None:
    same_selection(torch.randn(3, 90), Selection(20, 2), activation)


# The whole op, against the reference in float64.


@case([3, 4], 24, 40, 10, 1, "silu", torch.float32, 0)
@case([0, 5, 0, 1], 21, 33, 1, 1, "gelu", torch.float32, 3)
@case([2, 2], 20, 48, 48, 1, "sigmoid", torch.float32, 0)
@case([1], 8, 36, 12, 3, "relu", torch.float32, 2)
@case([3, 2], 16, 36, 12, 1, "squared_relu", torch.float32, 1)
@case([0, 0], 8, 12, 4, 1, "silu", torch.float32, 0)
@case([18, 1], 8, 32, 8, 1, "silu", torch.float32, 0)
@case([4, 3], 32, 160, 40, 2, "silu", torch.bfloat16, 5)
def whole_op(counts, hidden, neurons, kept, groups, activation, dtype, spare) -> None:
    """Values, gradients and mask, with rows of no expert; rows that TMA takes and others. Kept for
    backward beside the weights: x, p, a, u and the bits."""
    leaves = inputs(counts, hidden, neurons, dtype, spare)
    saved: list[Tensor] = []

    def run(x, p, n, *w):
        y, mask, _ = masked_experts(
            x, p, torch.tensor(n), *w, choose=Selection(kept, groups), activation=activation
        )
        return y, mask

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        run(*leaves[:2], counts, *leaves[2:])
    rows, words = sum(counts) + spare, -(-neurons // 32)
    shapes = sorted(tuple(t.shape) for t in saved if t.dim() < 3)
    assert shapes == sorted([(rows,), (rows, hidden), *[(rows, kept)] * 2, (rows, words)]), shapes
    mask = against_reference(run, leaves, counts, activation, spare)
    if dtype == torch.float32 and rows:
        real = sum(counts)
        parts = zip(leaves[0].detach()[:real].split(counts), leaves[2].detach(), strict=True)
        gate_NF = gate_activation(activation, torch.cat([x @ w.t() for x, w in parts]))
        rule = NeuronSelector("topk", kept, kept, groups=groups)
        assert torch.equal(mask.to_bool()[:real], rule(gate_NF))


@case()
def bad_rows_are_marked() -> None:
    """Infinite, NaN, and none; counted by expert."""
    counts = torch.tensor([3, 0, 2])
    x, p, *w = (t.detach() for t in inputs([3, 0, 2], 16, 32, torch.float32, 1))
    x[1], w[2][2, :, 3] = torch.inf, torch.nan
    x.requires_grad_()  # without gradients, few rows go another way
    _, _, kept = masked_experts(x, p, counts, *w, choose=Selection(8), activation="silu")
    assert kept.bad_N[:5].tolist() == [0, 1, 0, 1, 1]
    first_EX = torch.tensor([[4, 1, 9], [0, 0, 0], [0, 0, 0]])
    p[4] = -0.5  # marked
    kept.note_bad(p, first_EX, 7)
    assert first_EX.tolist() == [[4, 1, 9], [0, 0, 0], [7, 2 + (1 << 32), 2]]


@case(torch.float32)
@case(torch.bfloat16)
def gradients_go_where_they_are_wanted(dtype: torch.dtype) -> None:
    """Into main_grad, added to what is there; and later, on demand: the same bits."""
    counts = [2, 0, 17]
    leaves = inputs(counts, 16, 48, dtype)
    dy = torch.randn(19, 16).to(dtype)

    def run(sinks: bool, later: list | None) -> list[Tensor | None]:
        x, p, *w = leaves
        views = [t.view_as(t) for t in w]
        main = [torch.full(t.shape, 0.5) for t in w]
        for view, into in zip(views, main, strict=True):
            if sinks:
                view.grad_sink = lambda into=into: into
        if later is not None:
            views[0].grad_later = later
        y, _, _ = masked_experts(
            x, p, torch.tensor(counts), *views, choose=Selection(12), activation="silu"
        )
        grads = torch.autograd.grad(y, (x, p, *views), dy, allow_unused=True)
        made = list(grads[2:])
        if later is not None:
            assert made == [None] * 3
            made = [g for make in later for g in make()]
        return main if sinks else made

    plain, into = run(False, None), run(True, None)
    for grad, main in zip(plain, into, strict=True):
        close(main - 0.5, grad, dtype)
    for sinks, now in ((False, plain), (True, into)):
        for first, second in zip(now, run(sinks, []), strict=True):
            assert torch.equal(first, second)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    rows_of.TILE = 16  # here alone: a row costs the interpreter as much as a tile does
    poison()
    quicken_interpreter()
    for name in [name for name in CASES if sys.argv[2:] and name.split("-")[0] not in sys.argv[2:]]:
        del CASES[name]
    results = run_all()
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    if sys.argv[2:]:
        print("\n".join(text for text in results.values() if text) or f"{len(results)} pass")
