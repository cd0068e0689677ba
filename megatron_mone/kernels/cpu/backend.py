"""The native CPU backend of the masked grouped expert MLP.

    a = x W_gate^T            dense (torch's GEMM), a tile of rows at a time; only the kept entries
                              of a tile outlive it. A ready mask makes it sparse too.
    choose -> kept (n, j)     exact top-S natively, or the caller's rule
    u = <x_n, W_up_j>, h = p sigma(a) u, y = sum of h W_down_j    kept entries alone
The backward pass is sparse in the mask throughout (MONE.md, "Backward"). Saved for it, beside x, p
and the weights: a, u and the neuron of each kept entry, and the row offsets; nothing of width F.
Selection is not differentiated. Results do not depend on the number of threads, but for torch's
own GEMM. Shapes: N rows grouped by expert, E experts, F neurons, H hidden, K kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import byref
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.cpu import build, native
from megatron_mone.kernels.cpu.products import (
    DenseProducts,
    SparseProducts,
    empty,
    scratch,
    unit_stride,
)
from megatron_mone.kernels.operands import apply_rule
from megatron_mone.kernels.registry import Backend, Call, GroupedMLPOutput, register
from megatron_mone.moe.neuron_mask import NeuronMask, index_dtype
from megatron_mone.moe.neuron_selection import block_scores

ACTIVATIONS = tuple(native.ACTIVATION_CODES)
TILE_ROWS = 512  # gate activations [TILE_ROWS, F] live at once
DENSE_ABOVE = 0.7  # kept share above which GEMMs are faster than the sparse kernels


@cache  # asked for in every forward, and a failed build is not to be tried again
def available() -> tuple[bool, str]:
    """Whether the kernels run here, built now if need be; the reason when they do not."""
    try:
        native.load()
    except build.BuildError as error:
        return False, str(error)
    return True, ""


def masked_grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    counts: Sequence[int],
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    choose: Choose,
    activation: str,
) -> tuple[Tensor, NeuronMask, Tensor]:
    """Run the routed rows through their experts, computing only the chosen neurons.

    Args:
        x_NH: [N, H] rows grouped by expert, float32 or bfloat16.
        probs_N: [N] router probabilities, any float dtype.
        counts: E row counts that sum to N.
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype.
        choose: a Selection; a mask; or gate activations [N, F] (detached) -> [N, F] bool, called
            once, for rules that talk to other ranks.
        activation: silu, sigmoid, gelu (by erf) or relu.

    Returns:
        y_NH: [N, H] outputs, the router's probability applied.
        mask: the neurons computed.
        gate_K: [K] sigma(a) of the kept entries in the mask's order, with gradient.

    Raises:
        build.BuildError: the native library cannot be had (see `available`).
    """
    y_NH, gate_K, indices_K, offsets_N1 = _MaskedGroupedMLP.apply(
        x_NH, probs_N, w_gate_EFH, w_up_EFH, w_down_EFH, counts, choose, activation
    )
    if isinstance(choose, NeuronMask):
        return y_NH, choose, gate_K
    block = choose.block if isinstance(choose, Selection) else 1
    return y_NH, NeuronMask.unchecked(indices_K, offsets_N1, w_gate_EFH.shape[1], block), gate_K


class _MaskedGroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH, probs_N, w_gate, w_up, w_down, counts, choose, activation):
        layout = native.layout(counts, w_gate.shape[1], x_NH.shape[1])
        x_NH = unit_stride(x_NH)
        a_K, gate_K, indices_K, offsets_N1 = _gate(x_NH, w_gate, layout, choose, activation)
        products = _products(layout, indices_K, offsets_N1)
        if a_K is None:
            a_K = empty(indices_K.shape, torch.float32)
            products.sampled(x_NH, w_gate, a_K)
            a_K = a_K.to(x_NH.dtype)
            gate_K = gate_activation(activation, a_K)
        u_K = empty(indices_K.shape, torch.float32)
        products.sampled(x_NH, w_up, u_K)
        p_K = probs_N.float().repeat_interleave(offsets_N1.diff(), output_size=u_K.numel())
        y_NH = products.accumulate([(p_K.mul_(u_K).mul_(gate_K), w_down)], x_NH.dtype)
        ctx.save_for_backward(
            x_NH, probs_N, w_gate, w_up, w_down, a_K, u_K.to(x_NH.dtype), indices_K, offsets_N1
        )
        ctx.counts, ctx.activation = counts, activation
        ctx.mark_non_differentiable(indices_K, offsets_N1)
        ctx.set_materialize_grads(False)
        return y_NH, gate_K, indices_K, offsets_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH, dgate_K, _indices, _offsets):
        x_NH, probs_N, w_gate, w_up, w_down, a_K, u_K, indices_K, offsets_N1 = ctx.saved_tensors
        layout = native.layout(ctx.counts, w_gate.shape[1], x_NH.shape[1])
        products = _products(layout, indices_K, offsets_N1)
        dy_NH = torch.zeros_like(x_NH) if dy_NH is None else unit_stride(dy_NH)
        da_K, du_K, h_K = (scratch(n, a_K.shape, torch.float32) for n in ("da", "du", "h"))
        products.sampled(dy_NH, w_down, da_K)
        dprobs_N = empty(probs_N.shape, torch.float32)
        a_K, u_K, p_N = a_K.float(), u_K.float(), probs_N.float().contiguous()
        dgate_K = None if dgate_K is None else dgate_K.float().contiguous()
        products.kernels.gate_backward(
            byref(layout.shape()), byref(native.mask(indices_K, offsets_N1)),
            native.ACTIVATION_CODES[ctx.activation], a_K.data_ptr(), u_K.data_ptr(),
            p_N.data_ptr(), native.address(dgate_K), da_K.data_ptr(), du_K.data_ptr(),
            h_K.data_ptr(), dprobs_N.data_ptr(),
        )  # fmt: skip
        dx_NH = None
        if ctx.needs_input_grad[0]:
            dx_NH = products.accumulate([(da_K, w_gate), (du_K, w_up)], x_NH.dtype)
        dw = [None] * 3
        if any(ctx.needs_input_grad[2:5]):
            wanted = ctx.needs_input_grad[2:5]
            dw = products.weight_grads(da_K, du_K, h_K, x_NH, dy_NH, wanted)
        return dx_NH, dprobs_N.to(probs_N.dtype), *dw, None, None, None


def _products(layout: native.Layout, indices_K: Tensor, offsets_N1: Tensor):
    dense = indices_K.numel() > DENSE_ABOVE * layout.rows * layout.neurons
    return (DenseProducts if dense else SparseProducts)(layout, indices_K, offsets_N1)


def _gate(
    x_NH: Tensor, w_gate: Tensor, layout: native.Layout, choose: Choose, activation: str
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """(a_K, sigma(a)_K, indices, offsets) of the kept entries; a_K is None for a ready mask."""
    if isinstance(choose, NeuronMask):
        return None, None, choose.indices_K.contiguous(), choose.offsets_N1.contiguous()
    rows, neurons = layout.rows, layout.neurons
    if not isinstance(choose, Selection):
        a_NF = next((a for _, a in _gate_tiles(x_NH, w_gate, layout, rows)), None)
        a_NF = x_NH.new_empty((0, neurons)) if a_NF is None else a_NF
        gate_NF = gate_activation(activation, a_NF)
        mask = NeuronMask.from_bool(apply_rule(choose, gate_NF))
        kept = (mask.indices_K, mask.offsets_N1)
        return _pick(a_NF, *kept), _pick(gate_NF, *kept), *kept
    size = choose.kept
    indices_K = empty((rows * size,), index_dtype(neurons))
    offsets_N1 = torch.arange(rows + 1) * size
    a_K, gate_K = (empty((rows * size,), x_NH.dtype) for _ in range(2))
    for first, a_MF in _gate_tiles(x_NH, w_gate, layout, TILE_ROWS):
        gate_MF = gate_activation(activation, a_MF)
        part = slice(first * size, (first + a_MF.shape[0]) * size)
        select_rows(gate_MF, choose, indices_K[part])
        tile = (indices_K[part], offsets_N1[: a_MF.shape[0] + 1])
        _pick(a_MF, *tile, out_K=a_K[part])
        _pick(gate_MF, *tile, out_K=gate_K[part])
    return a_K, gate_K, indices_K, offsets_N1


def _gate_tiles(
    x_NH: Tensor, w_gate: Tensor, layout: native.Layout, most: int
) -> Iterator[tuple[int, Tensor]]:
    """(first row, a [M, F]) over all rows, M <= most; small experts share a tile, as all tiles
    share one buffer."""
    buffer = scratch("gate", (min(most, layout.rows), layout.neurons), x_NH.dtype)
    first = filled = row = 0
    for count, w in zip(layout.counts, w_gate.unbind(), strict=True):
        end = row + count
        while row < end:
            size = min(end - row, most - filled)
            torch.mm(x_NH[row : row + size], w.t(), out=buffer[filled : filled + size])
            row, filled = row + size, filled + size
            if filled == most:
                yield first, buffer
                first, filled = row, 0
    if filled:
        yield first, buffer[:filled]


def select_rows(gate_MF: Tensor, selection: Selection, indices_K: Tensor) -> None:
    """Write the M * S chosen neurons of each row, ascending, into `indices_K` (contiguous)."""
    block = selection.block
    if block > 1:
        scores_MB = block_scores(gate_MF.abs(), block)
        blocks_K = empty((indices_K.numel() // block,), indices_K.dtype)
        select_rows(scores_MB, Selection(selection.kept // block, selection.groups), blocks_K)
        within_B = torch.arange(block, dtype=indices_K.dtype)
        torch.add(blocks_K.unsqueeze(1) * block, within_B, out=indices_K.view(-1, block))
        return
    gate_MF = gate_MF.float().contiguous()
    rows, neurons = gate_MF.shape
    layout = native.layout([rows], neurons, 0)
    keys = empty((layout.threads, neurons // selection.groups), torch.int32)
    native.kernels().select(
        byref(layout.shape()), gate_MF.data_ptr(), selection.kept // selection.groups,
        selection.groups, indices_K.data_ptr(), indices_K.element_size(), keys.data_ptr(),
    )  # fmt: skip


def _pick(
    dense_MF: Tensor, indices_K: Tensor, offsets_M1: Tensor, out_K: Tensor | None = None
) -> Tensor:
    """[K] entries of contiguous [M, F] rows at the mask's positions."""
    rows, neurons = dense_MF.shape
    out_K = empty((indices_K.numel(),), dense_MF.dtype) if out_K is None else out_K
    native.kernels().gather(
        byref(native.layout([rows], neurons, 0).shape()),
        byref(native.mask(indices_K, offsets_M1)), native.address(dense_MF), out_K.data_ptr(),
        dense_MF.element_size(),
    )  # fmt: skip
    return out_K


def why_not(call: Call) -> str | None:
    """The reason that a call cannot run here, or None."""
    if call.device != "cpu":
        return f"the tensors are on {call.device}"
    if call.activation not in ACTIVATIONS:
        return f"activation = {call.activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"the tensors are {call.dtype}, not float32 or bfloat16"
    if call.all_gates:
        return "the loss needs the gates of all neurons (mone_ng_loss_type = normalized)"
    usable, reason = available()
    return None if usable else reason


def _run(*operands: Any, choose: Choose, activation: str, **_unused: Any) -> GroupedMLPOutput:
    kept = masked_grouped_mlp(*operands, choose=choose, activation=activation)
    return GroupedMLPOutput(*kept, None)


register(Backend("cpu", why_not, _run))
