"""Rows of each expert padded with zeros to what an fp8 GEMM takes, around any GroupedLinears.

Megatron pads the rows before its experts and unpads their output (Fp8Padding, TEGroupedMLP). Here
each product does so itself, so that no padded row is ever chosen for, masked or balanced. Zero rows
add nothing to a product over rows, and the others are dropped: the results are exact. Costs a copy
of every operand and result of N rows, and at most `alignment` - 1 rows an expert; nothing where the
counts are multiples already (--moe-router-padding-for-quantization).
"""

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from megatron_mone.kernels.triton.products import GroupedLinears


class PaddedLinears:
    """Linears on counts that are multiples of `alignment`; see GroupedLinears.

    Args:
        make: of row counts, the linears to run.
        counts: rows of each expert.
        alignment: that each must be a multiple of.
    """

    def __init__(
        self, make: Callable[[list[int]], GroupedLinears], counts: list[int], alignment: int
    ) -> None:
        self.counts = counts
        self.padded = [-(-count // alignment) * alignment for count in counts]
        self.inner = make(self.padded)

    def rows_by_neurons(self, x_NH: Tensor, w_EFH: Tensor, *, gradient: bool = False) -> Tensor:
        """[N, F] x W^T."""
        return self._unpad(self.inner.rows_by_neurons(self._pad(x_NH), w_EFH, gradient=gradient))

    def rows_by_hidden(self, *products: tuple[Tensor, Tensor], gradient: bool = False) -> Tensor:
        """[N, H] sum of v W over the products (v_NF, w_EFH)."""
        wide = [(self._pad(v_NF), w_EFH) for v_NF, w_EFH in products]
        return self._unpad(self.inner.rows_by_hidden(*wide, gradient=gradient))

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, out_EFH: Tensor, adds: bool, gradient: Literal["v", "x"]
    ) -> None:
        """out [E, F, H] (+)= v^T x."""
        self.inner.weight_grad(self._pad(v_NF), self._pad(x_NH), out_EFH, adds, gradient)

    @cached_property
    def _places_N(self) -> Tensor:
        """[N] int64 place of each row among the padded ones."""
        sizes, wide = torch.tensor(self.counts), torch.tensor(self.padded)
        shift_E = (wide.cumsum(0) - wide) - (sizes.cumsum(0) - sizes)
        return torch.arange(sum(self.counts)) + shift_E.repeat_interleave(sizes)

    def _pad(self, rows: Tensor) -> Tensor:
        if self.padded == self.counts:
            return rows
        wide = rows.new_zeros((sum(self.padded), rows.shape[1]))
        return wide.index_copy_(0, self._places_N.to(rows.device), rows)

    def _unpad(self, rows: Tensor) -> Tensor:
        if self.padded == self.counts:
            return rows
        return rows.index_select(0, self._places_N.to(rows.device))
