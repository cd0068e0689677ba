"""The products of MoNE's experts in fp8 (kernels/te) on tensors without values.

What is between them is the backend's own code. Each product is one grouped GEMM as in
grouped_linear.py, behind casts of both operands, which this backend makes for each product anew,
and copies of rows into padded ones and back. Counts of rows have no values here: of every expert
half of the rows are added that padding can add.
Shapes: N routed rows, P padded, E local experts, F neurons of an expert, H hidden.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from megatron_mone.planning.tracing.stand_ins.fp8 import FP8, MXFP8BlockScaling, Recipe, empty_copy
from megatron_mone.planning.tracing.stand_ins.op import note


class Fp8Products:
    """GroupedLinears (kernels/triton/products.py) of one layer's forward and backward pass.

    Args:
        recipe: of fp8.
        rows: N.
        experts: E.
        aligned: whether the router made all counts what fp8 takes.
    """

    def __init__(self, recipe: Recipe, rows: int, experts: int, aligned: bool) -> None:
        self.recipe, self.rows = recipe, rows
        align = 32 if isinstance(recipe, MXFP8BlockScaling) else 16
        self.padded = rows if aligned or not rows else rows + experts * align // 2

    def rows_by_neurons(self, x_NH: Tensor, w_EFH: Tensor, *, gradient: bool = False) -> Tensor:
        """[N, F] x W^T."""
        factors = self._rows(x_NH), self._weights(w_EFH).transpose(1, 2)
        return self._product(factors, w_EFH.shape[1], x_NH, gradient)

    def rows_by_hidden(self, *products: tuple[Tensor, Tensor], gradient: bool = False) -> Tensor:
        """[N, H] sum of v W."""
        made = []
        for v_NF, w_EFH in products:
            factors = self._rows(v_NF), self._weights(w_EFH, copies=2)
            made.append(self._product(factors, w_EFH.shape[2], v_NF, gradient))
        return made[-1]

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, out_EFH: Tensor, adds: bool, gradient: Literal["v", "x"]
    ) -> None:
        """out [E, F, H] (+)= v^T x."""
        factors = self._rows(v_NF, copies=2), self._rows(x_NH, copies=2)
        read = sum(factor.nbytes for factor in factors) + (out_EFH.nbytes if adds else 0)
        flops = 2 * self.padded * v_NF.shape[1] * x_NH.shape[1]
        name = "fused.grouped_gemm_wgrad"
        note(name, factors, [out_EFH], flops=flops, dtype=FP8, read=read)

    def _product(
        self, factors: Sequence[Tensor], width: int, like: Tensor, gradient: bool
    ) -> Tensor:  # fmt: skip
        made = like.new_empty(self.padded, width)
        flops = 2 * self.padded * like.shape[1] * width
        name = "fused.grouped_gemm_dgrad" if gradient else "fused.grouped_gemm"
        note(name, factors, [made], flops=flops, dtype=FP8)
        return self._resized(made, self.rows, "fused.unpad")

    def _rows(self, rows: Tensor, copies: int = 1) -> Tensor:
        """[P, ...] in fp8: padded, and cast by rows, or by rows and columns."""
        return self._cast(self._resized(rows, self.padded, "fused.pad"), copies)

    def _weights(self, w_EFH: Tensor, copies: int = 1) -> Tensor:
        """[E, F, H] in fp8."""
        flat = w_EFH.new_empty(w_EFH.shape[0] * w_EFH.shape[1], w_EFH.shape[2])
        return self._cast(flat, copies, is_weight=True).view(w_EFH.shape)

    def _cast(self, matrix: Tensor, copies: int, is_weight: bool = False) -> Tensor:
        made = [empty_copy(matrix, self.recipe, is_weight) for _ in range(copies)]
        note("fused.cast_fp8", [matrix], [part for copy in made for part in copy.tensors()])
        return made[-1].data

    def _resized(self, rows: Tensor, to: int, name: str) -> Tensor:
        if rows.shape[0] == to:
            return rows
        resized = rows.new_empty(to, *rows.shape[1:])
        note(name, [rows], [resized])
        return resized
