"""The products of one expert layer for a mask of whole blocks: gathered rows, small native GEMMs.

Same interface as `products.SparseProducts`; the mask's entries are aligned blocks of a multiple of
native.BLOCK adjacent neurons. The order in which a sum is added depends only on its own row (y, dx)
or its own rows (weight gradients). Shapes: N rows grouped by expert, E experts, F neurons, H
hidden, K kept entries.
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


class BlockProducts(InMaskOrder, NativeProducts):
    """Native products of kept blocks; arguments as SparseProducts."""

    def __init__(self, layout: native.Layout, indices_K: Tensor, offsets_N1: Tensor) -> None:
        super().__init__(layout, indices_K, offsets_N1)
        tiles = sum(-(-count // native.TILE) for count in layout.counts)
        starts = empty((tiles, layout.neurons // native.BLOCK + 1), torch.int32)
        entries = empty((indices_K.numel() // native.BLOCK, 2), torch.int32)
        self._keep = (starts, entries)
        self.lists = native.blocks(starts, entries)
        self.kernels.block_lists(byref(self.shape), byref(self.mask), byref(self.lists))

    def sampled(self, x_NH: Tensor, weight_EFH: Tensor, out_K: Tensor) -> None:
        """out_K = <x_n, weight_j>."""
        wide_NH, weight_EFH = wide_rows(x_NH, self.layout), unit_stride(weight_EFH)
        self.kernels.block_sampled(
            byref(self.shape), byref(self.mask), byref(self.lists), wide_NH.data_ptr(),
            wide_NH.stride(0), byref(native.matrix(weight_EFH)), out_K.data_ptr(),
        )  # fmt: skip

    def accumulate(self, terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """[N, H] sum over one or two (value_K, weight_EFH) of value * weight at kept entries."""
        out_NH = empty((self.layout.rows, self.layout.hidden), dtype)
        _kept, arguments = sum_arguments(terms)
        self.kernels.block_accumulate(
            byref(self.shape), byref(self.mask), byref(self.lists),
            *arguments, byref(native.matrix(out_NH)),
        )  # fmt: skip
        return out_NH

    def weight_grads(self, terms: list[tuple[Tensor, Gradient]], x_NH: Tensor) -> None:
        """gradient (+)= value^T x over kept entries, for one or two (value_K, gradient)."""
        x_NH = unit_stride(x_NH)
        self.kernels.block_grads(
            byref(self.shape), byref(self.mask), byref(self.lists), *value_addresses(terms),
            byref(native.matrix(x_NH)), *gradient_matrices(terms),
        )  # fmt: skip
