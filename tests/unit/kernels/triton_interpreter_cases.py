"""The Triton kernels against torch, in Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.triton_interpreter_cases OUT.json

Writes {case: "" or its traceback}. Its own process, as the interpreter must be chosen before the
kernels are imported. Not run on a GPU: this checks what is computed, not how fast. The interpreter
truncates where a GPU rounds to bfloat16, which the bfloat16 tolerances allow for.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_mone.kernels import Selection
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype
from megatron_mone.kernels.neuron_selection import NeuronSelector
from megatron_mone.kernels.triton import (
    arguments,
    block_grouped_mlp,
    masked_grouped_mlp,
    unstructured,
)
from megatron_mone.kernels.triton.availability import kernels
from megatron_mone.kernels.triton.block_index import block_index
from tests.unit.kernels import triton_public_cases  # noqa: F401  (registers its cases)
from tests.unit.kernels.triton_case_tools import (
    BOTH,
    against_reference,
    case,
    close,
    inputs,
    run_all,
)

# Selection: exact, so compared bit for bit with the torch selector.


def same_selection(value_NF: Tensor, kept: int, groups: int = 1) -> None:
    (select,) = kernels("select")
    index_NS, kept_NS = select.select_neurons(value_NF, kept, groups)
    mask_NF = NeuronSelector("topk", kept, kept, groups=groups)(value_NF)
    want = NeuronMask.from_bool(mask_NF)
    assert index_NS.dtype == index_dtype(value_NF.shape[1])
    assert torch.equal(index_NS.flatten(), want.indices_K)
    picked = value_NF.gather(1, index_NS.long())
    torch.testing.assert_close(kept_NS, picked, rtol=0, atol=0, equal_nan=True)


@case(0, 12, 3, 1)
@case(1, 1, 1, 1)
@case(1, 1408, 352, 1)
@case(5, 100, 1, 1)
@case(5, 100, 100, 1)
@case(4, 127, 31, 1)
@case(4, 129, 128, 1)
@case(2, 96, 24, 4)
@case(2, 90, 6, 6)
def selection(rows: int, neurons: int, kept: int, groups: int) -> None:
    """Random values, then few distinct ones (ties), in both types."""
    for dtype in BOTH:
        same_selection(torch.randn(rows, neurons).to(dtype), kept, groups)
        same_selection(torch.randint(-2, 3, (rows, neurons)).to(dtype), kept, groups)


@case()
def selection_special() -> None:
    """Zeros of both signs, NaN, infinities, subnormals."""
    for dtype in BOTH:
        same_selection(torch.zeros(2, 37, dtype=dtype), 9)
        special = torch.tensor([0.0, -0.0, 1e-39, -1e-39, 1.0, -1.0])
        value = special[torch.randint(0, 6, (6, 50))].to(dtype)
        value[0, 40] = torch.nan
        value[1, ::3] = torch.nan
        value[2, 5], value[2, 6] = torch.inf, -torch.inf
        value[3] = torch.nan
        value[4, 49], value[4, 3] = -torch.nan, torch.inf
        for kept in (1, 2, 17):
            same_selection(value, kept)


@case()
def selection_wide() -> None:
    """Rows too wide to be held whole, ties across stretches, and indices beyond 16 bits."""
    same_selection(torch.randn(1, 9001), 2000)
    same_selection(torch.randint(-1, 2, (1, 12_289)).bfloat16(), 11_000)
    same_selection(torch.randn(1, 40_000), 8, 4)


@case("silu")
@case("sigmoid")
@case("gelu")
@case("relu")
def selection_fused(activation: str) -> None:
    """With sigma fused, the choice is the torch selector's on the kernels' own sigma."""
    gated, select = kernels("gated", "select")
    for dtype in BOTH:
        a_NF = torch.randn(3, 90).to(dtype)
        every_NF = torch.arange(90, dtype=torch.int16).repeat(3, 1)
        gate_NF, _, _ = gated.gate_forward(
            a_NF, torch.ones_like(a_NF), torch.ones(3), every_NF,
            activation=activation, scattered=False,
        )  # fmt: skip
        close(gate_NF, gate_activation(activation, a_NF.double()), dtype)
        index_NS, kept_NS = select.select_neurons(a_NF, 20, 2, activation)
        mask_NF = NeuronSelector("topk", 20, 20, groups=2)(gate_NF)
        assert torch.equal(index_NS.flatten(), NeuronMask.from_bool(mask_NF).indices_K)
        assert torch.equal(kept_NS, a_NF.gather(1, index_NS.long()))


# The gated activation, against float64 autograd.


@case("silu", True)
@case("sigmoid", False)
@case("gelu", True)
@case("relu", False)
def gated_activation(activation: str, scattered: bool) -> None:
    """h, da, du, dp, with and without a gradient of the gate; more entries than one block."""
    (gated,) = kernels("gated")
    for dtype, rows, neurons, kept in (*((d, 3, 50, 13) for d in BOTH), (BOTH[0], 1, 1500, 1100)):
        index_NS = torch.rand(rows, neurons).argsort(1)[:, :kept].sort(1).values
        a, u, dh = (torch.randn(rows, kept).to(dtype) for _ in range(3))
        p, dgate = torch.rand(rows), torch.randn(rows, kept).to(dtype)
        wide = _wide(index_NS, neurons) if scattered else (lambda compact: compact)
        rule = {"activation": activation, "scattered": scattered}
        gate, u_kept, h = gated.gate_forward(a, wide(u), p, index_NS.short(), **rule)
        a64, u64, p64 = (t.double().requires_grad_() for t in (a, u, p))
        gate64 = gate_activation(activation, a64)
        h64 = p64[:, None] * gate64 * u64
        close(gate, gate64.detach(), dtype)
        close(h, wide(h64.detach()), dtype)
        assert torch.equal(u_kept, u)
        for extra in (None, dgate):
            da, du, again, dp = gated.gate_backward(
                a, u, p, index_NS.short(), wide(dh), extra, **rule
            )
            loss = (h64 * dh).sum() + (0 if extra is None else (gate64 * extra).sum())
            want = torch.autograd.grad(loss, (a64, u64, p64), retain_graph=True)
            close(da, wide(want[0]), dtype)
            close(du, wide(want[1]), dtype)
            close(dp, want[2], dtype)
            assert torch.equal(again, h)


def _wide(index_NS: Tensor, neurons: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.new_zeros(t.shape[0], neurons).scatter(1, index_NS, t)


# The whole op, against the reference in float64.


@case([3, 4], 24, 40, 10, 1, "silu", torch.float32)
@case([0, 5, 0, 1], 16, 33, 1, 1, "gelu", torch.float32)
@case([2, 2], 20, 48, 48, 1, "sigmoid", torch.float32)
@case([1], 8, 36, 12, 3, "relu", torch.float32)
@case([0, 0], 8, 12, 4, 1, "silu", torch.float32)
@case([4, 3], 32, 64, 16, 2, "silu", torch.bfloat16)
def whole_op(counts, hidden, neurons, kept, groups, activation, dtype) -> None:
    """Values, gradients and mask; saved for backward: nothing of width F but the weights."""
    leaves = inputs(counts, hidden, neurons, dtype)
    saved: list[Tensor] = []

    def run(*tensors):
        return masked_grouped_mlp(*tensors, choose=Selection(kept, groups), activation=activation)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        run(*leaves[:2], counts, *leaves[2:])
    rows = sum(counts)
    shapes = sorted(tuple(t.shape) for t in saved if t.dim() < 3)
    assert shapes == sorted([(rows,), (rows, hidden), *[(rows, kept)] * 3]), shapes
    mask = against_reference(run, leaves, counts, activation, ("y", "gate"))
    if dtype == torch.float32:
        parts = zip(leaves[0].detach().split(counts), leaves[2].detach().unbind(), strict=True)
        gate_NF = gate_activation(activation, torch.cat([x @ w.t() for x, w in parts]))
        assert torch.equal(
            mask.to_bool(), NeuronSelector("topk", kept, kept, groups=groups)(gate_NF)
        )


@case("y")
@case("gate")
def gradients_of_one_output(through: str) -> None:
    """The other output may go unused."""
    chosen = torch.tensor([[0], [1], [1]])
    ways = (
        lambda *t: masked_grouped_mlp(*t, choose=Selection(8), activation="silu"),
        lambda *t: block_grouped_mlp(*t, blocks_NQ=chosen, block=16, activation="silu"),
    )
    for run in ways:
        leaves = inputs([2, 1], 16, 32, torch.float32)
        against_reference(run, leaves, [2, 1], "silu", (through,))


@case(torch.float32)
@case(torch.bfloat16)
def decoding(dtype: torch.dtype) -> None:
    """Few rows without gradients take the gathered kernels: the same as the dense route, also where
    gate and up are slices of one parameter, and where the mask is ready."""
    counts, choose = [1, 0, 2], Selection(20)
    leaves = inputs(counts, 272, 128, dtype)
    assert unstructured.gathering_pays(counts, 20, 128)
    assert not unstructured.gathering_pays([5], 40, 128)
    gate_up = torch.stack([leaf.detach() for leaf in leaves[2:4]], dim=1)
    operands = (*leaves[:2], counts, gate_up[:, 0], gate_up[:, 1], leaves[4])
    assert all(arguments.neuron_major(w) is w for w in operands[3:])
    dense, mask, gate_K = masked_grouped_mlp(*operands, choose=choose, activation="silu")
    with torch.no_grad():
        y, same, gates = masked_grouped_mlp(*operands, choose=choose, activation="silu")
        again, _, sampled_K = masked_grouped_mlp(*operands, choose=mask, activation="silu")
    assert same == mask
    assert torch.equal(gates, gate_K)
    close(y, dense, dtype)
    close(again, dense, dtype)
    close(sampled_K, gate_K, dtype)


@case(1, 5, 7, 300)
@case(3, 33, 40, 16)
@case(0, 4, 4, 16)
def gathered_products(rows: int, kept: int, neurons: int, hidden: int) -> None:
    """sampled_up and sparse_down alone, with several splits and partial tiles."""
    sampled, sparse = kernels("sampled_up", "sparse_down")
    index_NS = torch.rand(rows, neurons).argsort(1)[:, :kept].sort(1).values
    expert_N = torch.randint(0, 2, (rows,), dtype=torch.int32)
    x_NH, h_NS = torch.randn(rows, hidden), torch.randn(rows, kept)
    w_EFH = torch.randn(2, neurons, hidden)
    picked_NSH = w_EFH[expert_N.long()[:, None], index_NS]
    u_NS = sampled.sampled_up(x_NH, w_EFH, expert_N, index_NS.short())
    close(u_NS, torch.einsum("nh,nsh->ns", x_NH, picked_NSH), torch.float32)
    y_NH = sparse.sparse_down(h_NS, w_EFH, expert_N, index_NS.int())
    close(y_NH, torch.einsum("ns,nsh->nh", h_NS, picked_NSH), torch.float32)


# Kept blocks.


@case([3, 0, 4], 24, 64, 2, 16, "silu", torch.float32)
@case([70, 70], 24, 16, 1, 16, "gelu", torch.float32)
@case([2], 130, 64, 2, 32, "relu", torch.float32)
@case([1, 2], 16, 128, 1, 128, "sigmoid", torch.float32)
@case([0, 0], 16, 32, 1, 16, "silu", torch.float32)
@case([5, 4], 32, 64, 2, 16, "silu", torch.bfloat16)
def whole_op_blocks(counts, hidden, neurons, slots, block, activation, dtype) -> None:
    """Values and gradients against the reference under the mask that the blocks make."""
    chosen = torch.rand(sum(counts), neurons // block).argsort(1)[:, :slots].sort(1).values
    leaves = inputs(counts, hidden, neurons, dtype)

    def run(*tensors):
        return block_grouped_mlp(*tensors, blocks_NQ=chosen, block=block, activation=activation)

    mask = against_reference(run, leaves, counts, activation, ("y", "gate"))
    want = torch.zeros(sum(counts), neurons // block, dtype=torch.bool).scatter(1, chosen, True)
    assert torch.equal(mask.to_bool(), want.repeat_interleave(block, dim=1))


@case()
def block_index_covers_each_pair_once() -> None:
    """Tiles partition the pairs, hold one segment each, and padding points past the segments."""
    chosen = torch.rand(50, 4).argsort(1)[:, :2]
    expert_N = torch.arange(50, dtype=torch.int32) // 25
    index = block_index(chosen, expert_N, 2, 64, 16, tile_rows=8)
    seen: list[int] = []
    for segment, first in torch.stack((index.tile_segment_T, index.tile_first_T), 1).tolist():
        if segment == index.segments:
            continue
        pairs = index.pairs_P[first : min(first + 8, int(index.offsets_Z1[segment + 1]))].tolist()
        assert pairs
        for pair in pairs:
            row, slot = divmod(pair, 2)
            assert segment == int(expert_N[row]) * 4 + int(chosen[row, slot])
        seen += pairs
    assert sorted(seen) == list(range(100))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(run_all(), indent=1))
