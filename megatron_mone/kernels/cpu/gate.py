"""The gates of all neurons, a tile of rows at a time, and the choice among them.

Only the kept entries of a tile outlive it. Shapes: N rows grouped by expert, M rows of a tile, E
experts, F neurons, H hidden, S kept of a row, K kept in all.
"""

from collections.abc import Iterator
from ctypes import byref
from dataclasses import replace

import torch
from torch import Tensor

from megatron_mone.common.phases import GATE_GEMM, SELECTION, enter
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.cpu import native
from megatron_mone.kernels.cpu.every_neuron import all_products
from megatron_mone.kernels.cpu.products import empty, scratch
from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype
from megatron_mone.kernels.operands import apply_rule

TILE_ROWS = 512  # gate pre-activations [TILE_ROWS, F] live at once


def kept_gates(
    x_NH: Tensor, w_gate: Tensor, layout: native.Layout, choose: Choose, activation: str
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """(a_K, sigma(a)_K, indices, offsets) of the kept entries; a_K is None for a ready mask."""
    if isinstance(choose, NeuronMask):
        return None, None, choose.indices_K.contiguous(), choose.offsets_N1.contiguous()
    rows, neurons = layout.rows, layout.neurons
    if not isinstance(choose, Selection):
        a_NF = _all_gates(x_NH, w_gate, layout)
        gate_NF = gate_activation(activation, a_NF)
        enter(SELECTION)
        mask = NeuronMask.from_bool(apply_rule(choose, gate_NF))
        kept = (mask.indices_K, mask.offsets_N1)
        return _pick(a_NF, *kept), _pick(gate_NF, *kept), *kept
    if choose.kept == neurons:  # nothing is chosen or moved
        a_K = _all_gates(x_NH, w_gate, layout).view(-1)
        indices_K = torch.arange(neurons, dtype=index_dtype(neurons)).repeat(rows)
        return a_K, gate_activation(activation, a_K), indices_K, torch.arange(rows + 1) * neurons
    size = choose.kept
    indices_K = empty((rows * size,), index_dtype(neurons))
    offsets_N1 = torch.arange(rows + 1) * size
    a_K, gate_K = (empty((rows * size,), x_NH.dtype) for _ in range(2))
    for first, a_MF in _gate_tiles(x_NH, w_gate, layout):
        enter(SELECTION)
        part = slice(first * size, (first + a_MF.shape[0]) * size)
        choose_rows(a_MF, activation, choose, indices_K[part], a_K[part], gate_K[part])
    return a_K, gate_K, indices_K, offsets_N1


def _all_gates(x_NH: Tensor, w_gate: Tensor, layout: native.Layout) -> Tensor:
    """x W_gate^T, [N, F] in x's dtype."""
    a_NF = empty((layout.rows, layout.neurons), x_NH.dtype)
    if x_NH.dtype == torch.float32:
        enter(GATE_GEMM)
        all_products(x_NH, w_gate, layout, a_NF)
        return a_NF
    for first, a_MF in _gate_tiles(x_NH, w_gate, layout):
        a_NF[first : first + a_MF.shape[0]] = a_MF
    return a_NF


def _gate_tiles(
    x_NH: Tensor, w_gate: Tensor, layout: native.Layout
) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 a [M, F]) over all rows, M <= TILE_ROWS; small experts share a tile, as
    all tiles share one buffer."""
    buffer = scratch("tile", (min(TILE_ROWS, layout.rows), layout.neurons), torch.float32)
    for first in range(0, layout.rows, TILE_ROWS):
        tile = _part_of(layout, first, min(first + TILE_ROWS, layout.rows))
        a_MF = buffer[: tile.rows]
        enter(GATE_GEMM)
        all_products(x_NH[first : first + tile.rows], w_gate, tile, a_MF)
        yield first, a_MF


def _part_of(layout: native.Layout, first: int, end: int) -> native.Layout:
    """The layout of rows [first, end) alone."""
    if (first, end) == (0, layout.rows):
        return layout
    counts, row = [], 0
    for count in layout.counts:
        counts.append(max(0, min(row + count, end) - max(row, first)))
        row += count
    return replace(layout, counts=tuple(counts))


def choose_rows(
    a_MF: Tensor,
    activation: str,
    selection: Selection,
    indices_K: Tensor,
    a_K: Tensor,
    gate_K: Tensor,
) -> None:
    """Write the M * S chosen neurons of each row, ascending, and their a and sigma(a), all
    contiguous; a_MF, float32, is rounded to the dtype of those."""
    layout, address = native.layout([a_MF.shape[0]], a_MF.shape[1], 0), native.address
    work = empty((layout.threads, 3 * native.padded(layout.neurons)), torch.int32)
    native.kernels().choose(
        byref(layout.shape()), address(a_MF), native.ACTIVATION_CODES[activation],
        *_of_group(selection), address(indices_K), indices_K.element_size(),
        work.data_ptr(), a_K.element_size(), address(a_K), address(gate_K),
    )  # fmt: skip


def select_rows(gate_MF: Tensor, selection: Selection, indices_K: Tensor) -> None:
    """Write the M * S chosen neurons of each row, ascending, into `indices_K` (contiguous): the
    choice of `choose_rows` alone, for who has gates; races time it, no layer calls it."""
    gate_MF = gate_MF.contiguous()
    if gate_MF.dtype not in (torch.float32, torch.bfloat16):
        gate_MF = gate_MF.float()
    layout = native.layout([gate_MF.shape[0]], gate_MF.shape[1], 0)
    keys = empty((layout.threads, 2 * native.padded(layout.neurons)), torch.int32)
    native.kernels().select(
        byref(layout.shape()), gate_MF.data_ptr(), gate_MF.element_size(),
        *_of_group(selection), indices_K.data_ptr(), indices_K.element_size(), keys.data_ptr(),
    )  # fmt: skip


def _of_group(selection: Selection) -> tuple[int, int, int]:
    """(kept of a group, groups, block) as arguments."""
    return selection.kept // selection.groups, selection.groups, selection.block


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
