"""Rows of each expert padded with zeros to what an fp8 GEMM takes, around any GroupedLinears.

Megatron pads the rows before its experts and unpads their output (Fp8Padding, TEGroupedMLP). Here
each product does so itself, so that no padded row is ever chosen for, masked or balanced. Zero rows
add nothing to a product over rows, and the others are dropped: the results are exact. Costs a copy
of every operand and result of N rows, and at most `alignment` - 1 rows an expert; nothing where the
counts are multiples already (--moe-router-padding-for-quantization).
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_mone.kernels.triton.linears import GroupedLinears


class PaddedLinears:
    """`inner` on counts that are multiples of `alignment`; see GroupedLinears."""

    def __init__(self, inner: GroupedLinears, alignment: int) -> None:
        self.inner, self.alignment = inner, alignment

    def rows_by_neurons(
        self,
        x_NH: Tensor,
        w_EFH: Tensor,
        counts: list[int],
        out_NF: Tensor | None = None,
        *,
        gradient: bool = False,
    ) -> Tensor:
        """[N, F] x W^T."""
        padded = self._padded(counts)
        if padded == counts:
            return self.inner.rows_by_neurons(x_NH, w_EFH, counts, out_NF, gradient=gradient)
        at_N = _places(counts, padded, x_NH.device)
        wide = self.inner.rows_by_neurons(
            _pad(x_NH, at_N, padded), w_EFH, padded, gradient=gradient
        )
        return wide.index_select(0, at_N)

    def rows_by_hidden(
        self, counts: list[int], *products: tuple[Tensor, Tensor], gradient: bool = False
    ) -> Tensor:
        """[N, H] sum of v W."""
        padded = self._padded(counts)
        if padded == counts:
            return self.inner.rows_by_hidden(counts, *products, gradient=gradient)
        at_N = _places(counts, padded, products[0][0].device)
        wide = [(_pad(v_NF, at_N, padded), w_EFH) for v_NF, w_EFH in products]
        return self.inner.rows_by_hidden(padded, *wide, gradient=gradient).index_select(0, at_N)

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, counts: list[int], *, gradient: Literal["v", "x"]
    ) -> Tensor:
        """[E, F, H] v^T x."""
        padded = self._padded(counts)
        if padded != counts:
            at_N = _places(counts, padded, x_NH.device)
            v_NF, x_NH = _pad(v_NF, at_N, padded), _pad(x_NH, at_N, padded)
        return self.inner.weight_grad(v_NF, x_NH, padded, gradient=gradient)

    def _padded(self, counts: list[int]) -> list[int]:
        return [-(-count // self.alignment) * self.alignment for count in counts]


def _places(counts: list[int], padded: list[int], device: torch.device) -> Tensor:
    """[N] int64 place of each row among the padded ones."""
    sizes, wide = torch.tensor(counts), torch.tensor(padded)
    shift_E = (wide.cumsum(0) - wide) - (sizes.cumsum(0) - sizes)
    return (torch.arange(sum(counts)) + shift_E.repeat_interleave(sizes)).to(device)


def _pad(rows: Tensor, at_N: Tensor, padded: list[int]) -> Tensor:
    return rows.new_zeros((sum(padded), rows.shape[1])).index_copy_(0, at_N, rows)
