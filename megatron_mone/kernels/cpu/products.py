"""The products of one expert layer that a mask makes sparse, on two routes with one interface.

`SparseProducts` runs the native kernels, whose work is proportional to the kept entries.
`DenseProducts` runs torch's GEMMs expert by expert and picks or spreads the kept entries: faster
where most neurons are kept. Arrays over kept entries ("_K") are float32 in CSR order.
Shapes: N rows grouped by expert, E experts, F neurons, H hidden, K kept entries.
"""

import math
import threading
from collections.abc import Iterator
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


class SparseProducts:
    """Native sampled products and accumulations.

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
        self._cuts: dict[int, tuple[Tensor, Tensor]] = {}

    def _cut_table(self, width: int) -> native._Cuts:
        if width not in self._cuts:
            blocks = -(-self.layout.neurons // width)
            self._cuts[width] = (
                empty((blocks + 1, self.layout.rows), torch.int32),
                empty((blocks, self.layout.rows), torch.int16),
            )
            table = native.cuts(*self._cuts[width])
            self.kernels.cuts(byref(self.shape), byref(self.mask), width, byref(table))
        return native.cuts(*self._cuts[width])

    def sampled(self, x_NH: Tensor, weight_EFH: Tensor, out_K: Tensor) -> None:
        """out_K = <x_n, weight_j>."""
        x_NH, weight_EFH = unit_stride(x_NH), unit_stride(weight_EFH)
        rows, strides = x_NH, (x_NH.stride(0), native.DOT_LENGTH)
        if x_NH.dtype != torch.float32 or self.layout.hidden % native.DOT_LENGTH:
            panels = -(-self.layout.hidden // native.DOT_LENGTH)
            rows = scratch("panels", (panels, *x_NH.shape[:1], native.DOT_LENGTH), torch.float32)
            self.kernels.panels(byref(self.shape), byref(native.matrix(x_NH)), rows.data_ptr())
            strides = (native.DOT_LENGTH, rows.stride(0))
        cuts = self._cut_table(native.DOT_NEURONS)
        self.kernels.sampled(
            byref(self.shape), byref(self.mask), byref(cuts), rows.data_ptr(), *strides,
            byref(native.matrix(weight_EFH)), out_K.data_ptr(),
        )  # fmt: skip

    def accumulate(self, terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """[N, H] sum over one or two (value_K, weight_EFH) of value * weight at kept entries."""
        out_NH = empty((self.layout.rows, self.layout.hidden), dtype)
        cuts = self._cut_table(native.SUM_INPUTS)
        _kept, arguments = sum_arguments(terms)
        self.kernels.accumulate(
            byref(self.shape), byref(self.mask), byref(cuts),
            *arguments, byref(native.matrix(out_NH)),
        )  # fmt: skip
        return out_NH

    def weight_grads(self, terms: list[tuple[Tensor, Gradient]], x_NH: Tensor) -> None:
        """gradient (+)= value^T x over kept entries, for one or two (value_K, gradient)."""
        # an entry seen from its neuron takes 8 or 12 bytes: some experts' at a time
        self._cuts.clear()
        count, experts = len(self.layout.counts), max(1, len(self.layout.counts) // 4)
        experts = max(experts, self.layout.threads)
        for first in range(0, count, experts):
            self._grads_of(terms, unit_stride(x_NH), first, min(first + experts, count))

    def _grads_of(
        self, terms: list[tuple[Tensor, Gradient]], x_NH: Tensor, first: int, end: int
    ) -> None:
        """`weight_grads` of experts [first, end)."""
        neurons, counts = self.layout.neurons, self.layout.counts
        row = sum(counts[:first])
        last = row + sum(counts[first:end])
        kept = int(self.offsets_N1[last]) - int(self.offsets_N1[row])
        starts = empty((end - first, neurons + 1), torch.int64)
        blocks = sum(-(-rows // native.SUM_INPUTS) + 1 for rows in counts[first:end])
        at, order = (empty((blocks, neurons), t) for t in (torch.int32, torch.int16))
        cuts = native.cuts(at, order)
        entries = scratch("tile", (kept, len(terms) + 1), torch.float32)
        shape, addresses = self.layout.shape(first, end), value_addresses(terms)
        self.kernels.transpose(
            byref(shape), byref(self.mask), *addresses, starts.data_ptr(), byref(cuts),
            entries.data_ptr(),
        )  # fmt: skip
        part = [(value, Gradient(g.out_EFH[first:end], g.adds)) for value, g in terms]
        self.kernels.weight_grads(
            byref(shape), starts.data_ptr(), byref(cuts), entries.data_ptr(),
            byref(native.matrix(x_NH)), *gradient_matrices(part),
        )  # fmt: skip


class DenseProducts:
    """The same products by GEMM, one expert at a time; arguments as SparseProducts."""

    def __init__(self, layout: native.Layout, indices_K: Tensor, offsets_N1: Tensor) -> None:
        self.layout = layout
        self.indices_K, self.offsets_N1 = indices_K, offsets_N1
        self.keep_all = indices_K.numel() == layout.rows * layout.neurons
        self.kernels = native.kernels()

    def _experts(self) -> Iterator[tuple[int, slice, slice]]:
        """(expert, its rows, their kept entries) of experts that have rows."""
        first = 0
        for e, count in enumerate(self.layout.counts):
            rows = slice(first, first + count)
            first += count
            if count:
                yield e, rows, slice(int(self.offsets_N1[rows.start]), int(self.offsets_N1[first]))

    def _one(self, rows: slice, kept: slice) -> tuple[native._Shape, native._Mask, Tensor]:
        offsets = self.offsets_N1[rows.start : rows.stop + 1] - self.offsets_N1[rows.start]
        sizes = native.Layout(
            (rows.stop - rows.start,), self.layout.neurons, self.layout.hidden, self.layout.threads
        )
        return sizes.shape(), native.mask(self.indices_K[kept], offsets), offsets

    def _pick(self, dense_MF: Tensor, rows: slice, kept: slice, out_K: Tensor) -> None:
        if self.keep_all:
            out_K[kept] = dense_MF.flatten()
            return
        shape, mask, _offsets = self._one(rows, kept)
        dense_MF = dense_MF.float()
        self.kernels.gather(
            byref(shape), byref(mask), native.address(dense_MF), out_K[kept].data_ptr(), 4
        )

    def _spread(self, value_K: Tensor, rows: slice, kept: slice, dtype: torch.dtype) -> Tensor:
        if self.keep_all:
            return value_K[kept].view(-1, self.layout.neurons).to(dtype)
        shape, mask, _offsets = self._one(rows, kept)
        dense_MF = torch.zeros((rows.stop - rows.start, self.layout.neurons), dtype=dtype)
        self.kernels.scatter(
            byref(shape), byref(mask), value_K[kept].data_ptr(), byref(native.matrix(dense_MF))
        )
        return dense_MF

    def sampled(self, x_NH: Tensor, weight_EFH: Tensor, out_K: Tensor) -> None:
        """out_K = <x_n, weight_j>."""
        for e, rows, kept in self._experts():
            if self.keep_all and x_NH.dtype == out_K.dtype:
                out_MF = out_K[kept].view(-1, self.layout.neurons)
                torch.mm(x_NH[rows], weight_EFH[e].t(), out=out_MF)
            else:
                self._pick(x_NH[rows] @ weight_EFH[e].t(), rows, kept, out_K)

    def accumulate(self, terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """[N, H] sum over (value_K, weight_EFH) of value * weight at kept entries."""
        out_NH = empty((self.layout.rows, self.layout.hidden), dtype)
        for e, rows, kept in self._experts():
            value_K, weight_EFH = terms[0]
            torch.mm(self._spread(value_K, rows, kept, dtype), weight_EFH[e], out=out_NH[rows])
            for value_K, weight_EFH in terms[1:]:
                out_NH[rows] += self._spread(value_K, rows, kept, dtype) @ weight_EFH[e]
        return out_NH

    def weight_grads(self, terms: list[tuple[Tensor, Gradient]], x_NH: Tensor) -> None:
        """gradient (+)= value^T x over kept entries, for one or two (value_K, gradient)."""
        for value_K, (out_EFH, adds) in terms:
            if not adds:
                for e in (e for e, count in enumerate(self.layout.counts) if not count):
                    out_EFH[e] = 0
            for e, rows, kept in self._experts():
                spread = self._spread(value_K, rows, kept, x_NH.dtype)
                if not adds:
                    torch.mm(spread.t(), x_NH[rows], out=out_EFH[e])
                elif out_EFH.dtype == x_NH.dtype:
                    out_EFH[e].addmm_(spread.t(), x_NH[rows])
                else:
                    out_EFH[e] += spread.t() @ x_NH[rows]
