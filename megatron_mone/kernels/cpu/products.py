"""The products of one expert layer that a mask makes sparse, on two routes with one interface.

`SparseProducts` runs the native kernels, whose work is proportional to the kept entries.
`DenseProducts` runs torch's GEMMs expert by expert and picks or spreads the kept entries: faster
where most neurons are kept. Arrays over kept entries ("_K") are float32 in CSR order.
Shapes: N rows grouped by expert, E experts, F neurons, H hidden, K kept entries.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from ctypes import byref

import torch
from torch import Tensor

from megatron_mone.kernels.cpu import native

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


def wide(name: str, tensor: Tensor) -> Tensor:
    """The tensor in float32: itself, or a copy in the work space of that name."""
    if tensor.dtype == torch.float32:
        return tensor
    return scratch(name, tuple(tensor.shape), torch.float32).copy_(tensor)


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
        panels = -(-self.layout.hidden // native.DOT_LENGTH)
        x_CNP = scratch("panels", (panels, self.layout.rows, native.DOT_LENGTH), torch.float32)
        self.kernels.panels(byref(self.shape), byref(native.matrix(x_NH)), x_CNP.data_ptr())
        cuts = self._cut_table(native.DOT_NEURONS)
        self.kernels.sampled(
            byref(self.shape), byref(self.mask), byref(cuts), x_CNP.data_ptr(),
            byref(native.matrix(weight_EFH)), out_K.data_ptr(),
        )  # fmt: skip

    def accumulate(self, terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """[N, H] sum over one or two (value_K, weight_EFH) of value * weight at kept entries."""
        out_NH = empty((self.layout.rows, self.layout.hidden), dtype)
        cuts = self._cut_table(native.SUM_INPUTS)
        terms = [(value, unit_stride(weight)) for value, weight in terms]
        arguments = [
            part
            for value, weight in terms
            for part in (native.address(value), byref(native.matrix(weight)))
        ]
        self.kernels.accumulate(
            byref(self.shape), byref(self.mask), byref(cuts),
            *arguments, *(None,) * (4 - len(arguments)), byref(native.matrix(out_NH)),
        )  # fmt: skip
        return out_NH

    def weight_grads(
        self,
        da_K: Tensor,
        du_K: Tensor,
        h_K: Tensor,
        x_NH: Tensor,
        dy_NH: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> list[Tensor | None]:
        """[E, F, H] da^T x, du^T x and h^T dy, in x's dtype; None where not wanted."""
        sizes = self.layout
        starts = empty((len(sizes.counts), sizes.neurons + 1), torch.int64)
        blocks = sum(-(-count // native.SUM_INPUTS) + 1 for count in sizes.counts)
        at, order = (empty((blocks, sizes.neurons), t) for t in (torch.int32, torch.int16))
        cuts = native.cuts(at, order)
        size = self.indices_K.numel() * native.ENTRY_BYTES
        entries = scratch("entries", (size,), torch.uint8)
        self.kernels.transpose(
            byref(self.shape), byref(self.mask), native.address(da_K), native.address(du_K),
            native.address(h_K), starts.data_ptr(), byref(cuts), entries.data_ptr(),
        )  # fmt: skip
        shape = (len(sizes.counts), sizes.neurons, sizes.hidden)
        outs = [empty(shape, x_NH.dtype) if want else None for want in wanted]
        x_NH, dy_NH = unit_stride(x_NH), unit_stride(dy_NH)
        self.kernels.weight_grads(
            byref(self.shape), starts.data_ptr(), byref(cuts), entries.data_ptr(),
            byref(native.matrix(x_NH)), byref(native.matrix(dy_NH)),
            *(None if out is None else byref(native.matrix(out)) for out in outs),
        )  # fmt: skip
        return outs


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
            self._pick(x_NH[rows] @ weight_EFH[e].t(), rows, kept, out_K)

    def accumulate(self, terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """[N, H] sum over (value_K, weight_EFH) of value * weight at kept entries."""
        out_NH = empty((self.layout.rows, self.layout.hidden), dtype)
        for e, rows, kept in self._experts():
            parts = [self._spread(v, rows, kept, dtype) @ w[e] for v, w in terms]
            out_NH[rows] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return out_NH

    def weight_grads(
        self,
        da_K: Tensor,
        du_K: Tensor,
        h_K: Tensor,
        x_NH: Tensor,
        dy_NH: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> list[Tensor | None]:
        """[E, F, H] da^T x, du^T x and h^T dy, in x's dtype; None where not wanted."""
        shape = (len(self.layout.counts), self.layout.neurons, self.layout.hidden)
        outs = [empty(shape, x_NH.dtype) if want else None for want in wanted]
        operands = ((da_K, x_NH), (du_K, x_NH), (h_K, dy_NH))
        for out, (value_K, rows_NH) in zip(outs, operands, strict=True):
            if out is None:
                continue
            for e in (e for e, count in enumerate(self.layout.counts) if not count):
                out[e] = 0
            for e, rows, kept in self._experts():
                spread = self._spread(value_K, rows, kept, x_NH.dtype)
                torch.mm(spread.t(), rows_NH[rows], out=out[e])
        return outs
