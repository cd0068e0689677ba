"""The products of experts that have few rows: weights are read in place, once, without tables.

An expert has at most native.FEW_ROWS rows. Shapes: N rows grouped by expert, E experts, F neurons,
H hidden, K kept entries.
"""

from ctypes import byref

import torch
from torch import Tensor

from megatron_mone.kernels.cpu import native
from megatron_mone.kernels.cpu.products import (
    InMaskOrder,
    NativeProducts,
    empty,
    gradient_matrices,
    sum_arguments,
    unit_stride,
    value_addresses,
    wide_rows,
)
from megatron_mone.kernels.weight_views import Gradient


class FewProducts(InMaskOrder, NativeProducts):
    """Native products bound by reading the kept weights; arguments as SparseProducts."""

    def __init__(self, layout: native.Layout, indices_K: Tensor, offsets_N1: Tensor) -> None:
        assert max(layout.counts, default=0) <= native.FEW_ROWS, layout.counts
        super().__init__(layout, indices_K, offsets_N1)

    def sampled(self, x_NH: Tensor, weight_EFH: Tensor, out_K: Tensor) -> None:
        """out_K = <x_n, weight_j>."""
        wide_NH, weight_EFH = wide_rows(x_NH, self.layout), unit_stride(weight_EFH)
        self.kernels.few_sampled(
            byref(self.shape), byref(self.mask), wide_NH.data_ptr(), wide_NH.stride(0),
            byref(native.matrix(weight_EFH)), out_K.data_ptr(),
        )  # fmt: skip

    def accumulate(self, terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """[N, H] sum over one or two (value_K, weight_EFH) of value * weight at kept entries."""
        out_NH = empty((self.layout.rows, self.layout.hidden), dtype)
        _kept, arguments = sum_arguments(terms)
        self.kernels.few_accumulate(
            byref(self.shape), byref(self.mask), *arguments, byref(native.matrix(out_NH)),
        )  # fmt: skip
        return out_NH

    def weight_grads(self, terms: list[tuple[Tensor, Gradient]], x_NH: Tensor) -> None:
        """gradient (+)= value^T x over kept entries, for one or two (value_K, gradient)."""
        x_NH = x_NH.float().contiguous()
        self.kernels.few_grads(
            byref(self.shape), byref(self.mask), *value_addresses(terms), x_NH.data_ptr(),
            self.layout.hidden, *gradient_matrices(terms),
        )  # fmt: skip
