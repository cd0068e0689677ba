"""The gates of all neurons, a tile of rows at a time, and the choice among them.

Only the kept entries of a tile outlive it. Shapes: N rows grouped by expert, M rows of a tile, E
experts, F neurons, H hidden, S kept of a row, K kept in all.
"""

from collections.abc import Iterator, Sequence
from ctypes import byref
from dataclasses import replace

import torch
from torch import Tensor

from megatron_mone.common.phases import GATE_GEMM, SELECTION, enter
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.cpu import native
from megatron_mone.kernels.cpu.block_products import dense_products
from megatron_mone.kernels.cpu.products import empty, scratch
from megatron_mone.kernels.cpu.route import gate_by_gemm
from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype
from megatron_mone.kernels.operands import apply_rule

TILE_ROWS = 512  # gate activations [TILE_ROWS, F] live at once


def kept_gates(
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
        enter(SELECTION)
        mask = NeuronMask.from_bool(apply_rule(choose, gate_NF))
        kept = (mask.indices_K, mask.offsets_N1)
        return _pick(a_NF, *kept), _pick(gate_NF, *kept), *kept
    if choose.kept == neurons:
        return _all_gates(x_NH, w_gate, layout, activation)
    size = choose.kept
    indices_K = empty((rows * size,), index_dtype(neurons))
    offsets_N1 = torch.arange(rows + 1) * size
    a_K, gate_K = (empty((rows * size,), x_NH.dtype) for _ in range(2))
    for first, a_MF in _gate_tiles(x_NH, w_gate, layout, TILE_ROWS):
        gate_MF = gate_activation(activation, a_MF)
        enter(SELECTION)
        part = slice(first * size, (first + a_MF.shape[0]) * size)
        picked = ((a_MF, a_K[part]), (gate_MF, gate_K[part]))
        select_rows(gate_MF, choose, indices_K[part], picked)
    return a_K, gate_K, indices_K, offsets_N1


def _all_gates(
    x_NH: Tensor, w_gate: Tensor, layout: native.Layout, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kept_gates` where every neuron is kept: nothing is chosen or moved."""
    rows, neurons = layout.rows, layout.neurons
    a_NF = empty((rows, neurons), x_NH.dtype)
    enter(GATE_GEMM)
    _gates(x_NH, w_gate, layout, gate_by_gemm(layout, x_NH.dtype), a_NF)
    indices_K = torch.arange(neurons, dtype=index_dtype(neurons)).repeat(rows)
    a_K = a_NF.view(-1)
    return a_K, gate_activation(activation, a_K), indices_K, torch.arange(rows + 1) * neurons


def _gate_tiles(
    x_NH: Tensor, w_gate: Tensor, layout: native.Layout, most: int
) -> Iterator[tuple[int, Tensor]]:
    """(first row, a [M, F]) over all rows, M <= most; small experts share a tile, as all tiles
    share one buffer."""
    by_gemm = gate_by_gemm(layout, x_NH.dtype)
    buffer = scratch("tile", (min(most, layout.rows), layout.neurons), x_NH.dtype)
    for first in range(0, layout.rows, max(1, most)):
        tile = _part_of(layout, first, min(first + most, layout.rows))
        a_MF = buffer[: tile.rows]
        enter(GATE_GEMM)
        _gates(x_NH[first : first + tile.rows], w_gate, tile, by_gemm, a_MF)
        yield first, a_MF


def _gates(
    x_MH: Tensor, w_gate: Tensor, layout: native.Layout, by_gemm: bool, out_MF: Tensor
) -> None:
    """out_MF = x W_gate^T of each row's expert."""
    if not by_gemm:
        dense_products(x_MH, w_gate, layout, out_MF)
        return
    row = 0
    for count, w in zip(layout.counts, w_gate.unbind(), strict=True):
        if count:
            torch.mm(x_MH[row : row + count], w.t(), out=out_MF[row : row + count])
        row += count


def _part_of(layout: native.Layout, first: int, end: int) -> native.Layout:
    """The layout of rows [first, end) alone."""
    if (first, end) == (0, layout.rows):
        return layout
    counts, row = [], 0
    for count in layout.counts:
        counts.append(max(0, min(row + count, end) - max(row, first)))
        row += count
    return replace(layout, counts=tuple(counts))


def select_rows(
    gate_MF: Tensor,
    selection: Selection,
    indices_K: Tensor,
    picked: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Write the M * S chosen neurons of each row, ascending, into `indices_K` (contiguous), and of
    up to two (dense [M, F], out [M * S]) in the gates' dtype the values there."""
    gate_MF = gate_MF.contiguous()
    if gate_MF.dtype not in (torch.float32, torch.bfloat16):
        assert not picked
        gate_MF = gate_MF.float()
    rows, neurons = gate_MF.shape
    layout = native.layout([rows], neurons, 0)
    keys = empty((layout.threads, 2 * native.padded(neurons)), torch.int32)
    addresses = [native.address(tensor) for pair in picked for tensor in pair]
    native.kernels().select(
        byref(layout.shape()), gate_MF.data_ptr(), gate_MF.element_size(),
        selection.kept // selection.groups, selection.groups, selection.block,
        indices_K.data_ptr(), indices_K.element_size(), keys.data_ptr(),
        *[*addresses, None, None, None, None][:4],
    )  # fmt: skip


def _pick(dense_MF: Tensor, indices_K: Tensor, offsets_M1: Tensor) -> Tensor:
    """[K] entries of contiguous [M, F] rows at the mask's positions."""
    rows, neurons = dense_MF.shape
    out_K = empty((indices_K.numel(),), dense_MF.dtype)
    native.kernels().gather(
        byref(native.layout([rows], neurons, 0).shape()),
        byref(native.mask(indices_K, offsets_M1)), native.address(dense_MF), out_K.data_ptr(),
        dense_MF.element_size(),
    )  # fmt: skip
    return out_K
