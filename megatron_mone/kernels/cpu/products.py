"""The products of one expert layer that a mask makes sparse: those of single neurons, and what the
routes (route.py), all of one interface, have in common.

Arrays over kept entries ("_K") are float32, in the order that each route's kernels walk them.
Shapes: N rows grouped by expert, E experts, F neurons, H hidden, K kept entries.
"""

import math
import threading
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from megatron_mone.kernels.cpu import native
from megatron_mone.kernels.weight_views import Gradient

# Tests set this to see that every element handed out was written.
POISON = False


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory; NaN or the lowest integer where POISON is set."""
    space = torch.empty(shape, dtype=dtype)
    return poisoned(space) if POISON else space


def poisoned(space: Tensor) -> Tensor:
    """The tensor, filled with what no correct result contains."""
    return space.fill_(torch.nan if space.is_floating_point() else torch.iinfo(space.dtype).min)


_THREAD = threading.local()
KEPT_SCRATCH = 1 << 28  # bytes; larger work space is given back after the call


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Work space of one call, kept by this thread for its next one under the same name.

    Fresh pages cost as much as a fifth of a layer's time. Valid until the next use of the name.
    """
    size = math.prod(shape) * dtype.itemsize
    if size > KEPT_SCRATCH:
        return empty(shape, dtype)
    kept = _THREAD.__dict__
    if name not in kept or kept[name].numel() < size:
        kept[name] = torch.empty(size, dtype=torch.uint8)
    space = kept[name][:size].view(dtype).view(shape)
    return poisoned(space) if POISON else space


def release_scratch() -> None:
    """Give this thread's work space back."""
    _THREAD.__dict__.clear()


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def value_addresses(terms: list[tuple[Tensor, Gradient]]) -> list[int | None]:
    """The values of one or two terms as two arguments, null for a missing one."""
    return [*(native.address(value) for value, _ in terms), None][:2]


def gradient_matrices(terms: list[tuple[Tensor, Gradient]]) -> list[Any]:
    """The gradients of one or two terms as two arguments, null for a missing one."""
    return [*(byref(native.matrix(out, adds)) for _, (out, adds) in terms), None][:2]


def sum_arguments(terms: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Any]]:
    """(tensors to keep alive, the four arguments) of one or two (value_K, weight_EFH) to add up."""
    weights = [unit_stride(weight) for _, weight in terms]
    arguments: list[Any] = []
    for (value, _), weight in zip(terms, weights, strict=True):
        arguments += [native.address(value), byref(native.matrix(weight))]
    return weights, arguments + [None] * (4 - len(arguments))


def wide_rows(x_NH: Tensor, layout: native.Layout) -> Tensor:
    """[N, >= H] float32 rows of whole vectors: x itself where it is that, else a copy in scratch,
    zeros after H."""
    hidden = layout.hidden
    if x_NH.dtype == torch.float32 and x_NH.stride(-1) == 1 and hidden % native.WIDEST_VECTOR == 0:
        return x_NH
    x_NH = unit_stride(x_NH)
    width = native.padded(hidden)
    wide_NH = scratch("wide", (layout.rows, width), torch.float32)
    native.kernels().widen(
        byref(layout.shape()), byref(native.matrix(x_NH)), wide_NH.data_ptr(), width
    )
    return wide_NH


class InMaskOrder:
    """Products whose arrays over kept entries are all in the mask's order."""

    runs: native._Runs | None = None

    def mask_order(self, value_K: Tensor) -> Tensor:
        """The values, as they are."""
        return value_K

    def by_neuron(self, values: list[Tensor]) -> None:
        """Nothing: values stay as they are."""


class NativeProducts:
    """Products of native kernels over a mask.

    Args:
        layout: sizes and rows of each expert.
        indices_K: [K] int16 or int32, ascending within a row.
        offsets_N1: [N + 1] int64.
    """

    def __init__(self, layout: native.Layout, indices_K: Tensor, offsets_N1: Tensor) -> None:
        self.layout, self.shape = layout, layout.shape()
        self.indices_K, self.offsets_N1 = indices_K, offsets_N1
        self.mask = native.mask(indices_K, offsets_N1)
        self.kernels = native.kernels()


class SparseProducts(NativeProducts):
    """Native sampled products and accumulations, whose arrays over kept entries are in run order
    (MoneRuns of kernels.h); arguments as NativeProducts."""

    def __init__(self, layout: native.Layout, indices_K: Tensor, offsets_N1: Tensor) -> None:
        super().__init__(layout, indices_K, offsets_N1)
        self.spans = -(-layout.neurons // self.kernels.span)
        self.tiles = sum(-(-count // native.TILE) for count in layout.counts)
        self._tables = (
            empty((self.spans + 1, layout.rows), torch.int32),
            empty((self.tiles, self.spans + 1), torch.int64),
            empty((self.spans, layout.rows), torch.int16),
            empty((self.spans, layout.rows), torch.uint8),
            empty(indices_K.shape, torch.uint8),
        )
        self.runs = native.runs(*self._tables)
        self.kernels.runs(byref(self.shape), byref(self.mask), byref(self.runs))

    def mask_order(self, value_K: Tensor) -> Tensor:
        """The float32 values, from run order into the mask's."""
        out_K = torch.empty_like(value_K)
        self.kernels.mask_order(
            byref(self.shape), byref(self.mask), byref(self.runs),
            native.address(value_K), out_K.data_ptr(),
        )  # fmt: skip
        return out_K

    def sampled(self, x_NH: Tensor, weight_EFH: Tensor, out_K: Tensor) -> None:
        """out_K = <x_n, weight_j>."""
        x_NH, weight_EFH = unit_stride(x_NH), unit_stride(weight_EFH)
        self.kernels.sampled(
            byref(self.shape), byref(self.runs), byref(native.matrix(x_NH)),
            byref(native.matrix(weight_EFH)), out_K.data_ptr(),
        )  # fmt: skip

    def accumulate(self, terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """[N, H] sum over one or two (value_K, weight_EFH) of value * weight at kept entries."""
        out_NH = empty((self.layout.rows, self.layout.hidden), dtype)
        _kept, arguments = sum_arguments(terms)
        self.kernels.accumulate(
            byref(self.shape), byref(self.runs), *arguments, byref(native.matrix(out_NH))
        )
        return out_NH

    def by_neuron(self, values: list[Tensor]) -> None:
        """Put up to three arrays of kept entries, in place, into the order of `weight_grads`."""
        at = empty((self.tiles, self.spans, self.kernels.bins + 1), torch.int32)
        rows_K = empty(self.indices_K.shape, torch.uint8)
        size = 2 * native.TILE * self.kernels.span
        work = scratch("tile", (self.layout.threads, size), torch.int32)
        self._by_neuron = (at, rows_K)
        self.kernels.transpose(
            byref(self.shape), byref(self.runs),
            *[*map(native.address, values), None, None, None][:3],
            at.data_ptr(), rows_K.data_ptr(), work.data_ptr(),
        )  # fmt: skip

    def weight_grads(self, terms: list[tuple[Tensor, Gradient]], x_NH: Tensor) -> None:
        """gradient (+)= value^T x over kept entries, for one or two (value_K, gradient) whose
        values went through `by_neuron`."""
        x_NH = unit_stride(x_NH)
        at, rows_K = self._by_neuron
        self.kernels.weight_grads(
            byref(self.shape), byref(self.runs), at.data_ptr(), rows_K.data_ptr(),
            *value_addresses(terms), byref(native.matrix(x_NH)), *gradient_matrices(terms),
        )  # fmt: skip
