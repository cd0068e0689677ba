"""Products over every neuron: the gate's, and all of a layer that keeps most neurons.

Shapes: N rows grouped by expert, M of one expert, E experts, F neurons, H hidden, K kept entries.
"""

from collections.abc import Iterator
from ctypes import byref
from dataclasses import replace

import torch
from torch import Tensor

from megatron_mone.kernels.cpu import native
from megatron_mone.kernels.cpu.products import InMaskOrder, empty, scratch, unit_stride, wide_rows
from megatron_mone.kernels.cpu.route import by_gemm, gemm_dtype
from megatron_mone.kernels.weight_views import Gradient


def all_products(x_NH: Tensor, weight_EFH: Tensor, layout: native.Layout, out_NF: Tensor) -> None:
    """out_NF = <x_n, weight_j> in float32 for every neuron of each row's expert."""
    if not by_gemm(layout, x_NH.dtype):
        dense_products(x_NH, weight_EFH, layout, out_NF)
        return
    parts = zip(x_NH.split(layout.counts), out_NF.split(layout.counts), weight_EFH, strict=True)
    for x_MH, out_MF, w_FH in parts:
        if x_MH.dtype == out_MF.dtype:
            torch.mm(x_MH, w_FH.t(), out=out_MF)
        else:
            out_MF.copy_(x_MH @ w_FH.t())


def dense_products(x_NH: Tensor, weight_EFH: Tensor, layout: native.Layout, out_NF: Tensor) -> None:
    """`all_products` by the native kernel."""
    wide_NH, weight_EFH = wide_rows(x_NH, layout), unit_stride(weight_EFH)
    native.kernels().dense(
        byref(layout.shape()), wide_NH.data_ptr(), wide_NH.stride(0),
        byref(native.matrix(weight_EFH)), byref(native.matrix(out_NF)),
    )  # fmt: skip


class DenseProducts(InMaskOrder):
    """Products by GEMM, one expert at a time, whose kept entries are picked or spread: faster where
    most neurons are kept. Arguments as SparseProducts."""

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

    def _alone(self, rows: slice) -> native.Layout:
        return replace(self.layout, counts=(rows.stop - rows.start,))

    def _one(self, rows: slice, kept: slice) -> tuple[native._Shape, native._Mask, Tensor]:
        offsets = self.offsets_N1[rows.start : rows.stop + 1] - self.offsets_N1[rows.start]
        mask = native.mask(self.indices_K[kept], offsets)
        return self._alone(rows).shape(), mask, offsets

    def _pick(self, dense_MF: Tensor, rows: slice, kept: slice, out_K: Tensor) -> None:
        shape, mask, _offsets = self._one(rows, kept)
        self.kernels.gather(
            byref(shape), byref(mask), native.address(dense_MF), out_K[kept].data_ptr(), 4
        )

    def _spread(self, value_K: Tensor, rows: slice, kept: slice) -> Tensor:
        if self.keep_all:
            return value_K[kept].view(-1, self.layout.neurons)
        shape, mask, _offsets = self._one(rows, kept)
        dense_MF = torch.zeros((rows.stop - rows.start, self.layout.neurons))
        self.kernels.scatter(
            byref(shape), byref(mask), value_K[kept].data_ptr(), byref(native.matrix(dense_MF))
        )
        return dense_MF

    def sampled(self, x_NH: Tensor, weight_EFH: Tensor, out_K: Tensor) -> None:
        """out_K = <x_n, weight_j>."""
        if self.keep_all:
            all_products(x_NH, weight_EFH, self.layout, out_K.view(-1, self.layout.neurons))
            return
        for e, rows, kept in self._experts():
            one = self._alone(rows)
            dense_MF = scratch("spread", (one.rows, one.neurons), torch.float32)
            all_products(x_NH[rows], weight_EFH[e : e + 1], one, dense_MF)
            self._pick(dense_MF, rows, kept, out_K)

    def accumulate(self, terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """[N, H] sum over one or two (value_K, weight_EFH) of value * weight at kept entries."""
        out_NH, wide = empty((self.layout.rows, self.layout.hidden), dtype), gemm_dtype(dtype)
        for e, rows, kept in self._experts():
            out_MH = out_NH[rows]
            sums_MH = out_MH if dtype == wide else scratch("sums", tuple(out_MH.shape), wide)
            for term, (value_K, weight_EFH) in enumerate(terms):
                value_MF, w_FH = self._spread(value_K, rows, kept).to(wide), weight_EFH[e].to(wide)
                if term:
                    sums_MH.addmm_(value_MF, w_FH)
                else:
                    torch.mm(value_MF, w_FH, out=sums_MH)
            if sums_MH is not out_MH:
                out_MH.copy_(sums_MH)
        return out_NH

    def weight_grads(self, terms: list[tuple[Tensor, Gradient]], x_NH: Tensor) -> None:
        """gradient (+)= value^T x over kept entries, for one or two (value_K, gradient)."""
        dtype = gemm_dtype(x_NH.dtype)
        without_rows = [e for e, count in enumerate(self.layout.counts) if not count]
        for out_EFH in (out_EFH for _, (out_EFH, adds) in terms if not adds):
            for e in without_rows:
                out_EFH[e] = 0
        for e, rows, kept in self._experts():
            x_MH = x_NH[rows].to(dtype)
            for value_K, (out_EFH, adds) in terms:
                value_FM = self._spread(value_K, rows, kept).to(dtype).t()
                if out_EFH.dtype != dtype:
                    made_FH = value_FM @ x_MH
                    out_EFH[e] = out_EFH[e] + made_FH if adds else made_FH
                elif adds:
                    out_EFH[e].addmm_(value_FM, x_MH)
                else:
                    torch.mm(value_FM, x_MH, out=out_EFH[e])
