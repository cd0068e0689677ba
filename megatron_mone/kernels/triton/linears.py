"""The three dense grouped products of an expert layer behind one interface. Plain torch.

    rows_by_neurons   x W^T      up, gate, and the gradient of h (dy, w_down)
    rows_by_hidden    sum v W    down, and the gradient of x
    weight_grad       v^T x      all three weights
Every weight is neuron-major, so these three serve the forward and the backward pass alike. Rows are
grouped by expert. Shapes: N rows, E experts, F neurons of an expert, H hidden.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor


class GroupedLinears(Protocol):
    """What a GEMM library has to give: dense products, expert by expert, in the operands' dtype.

    `gradient` says which rows are gradients: fp8 recipes hold those in a format of their own.
    """

    def rows_by_neurons(
        self,
        x_NH: Tensor,
        w_EFH: Tensor,
        counts: list[int],
        out_NF: Tensor | None = None,
        *,
        gradient: bool = False,
    ) -> Tensor:
        """[N, F] x W^T; `out_NF` may be used for it."""
        ...

    def rows_by_hidden(
        self, counts: list[int], *products: tuple[Tensor, Tensor], gradient: bool = False
    ) -> Tensor:
        """[N, H] sum of v W over the products (v_NF, w_EFH)."""
        ...

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, counts: list[int], *, gradient: Literal["v", "x"]
    ) -> Tensor:
        """[E, F, H] v^T x, zero for experts without rows."""
        ...


class MatmulLinears:
    """One torch.mm for each expert."""

    def rows_by_neurons(
        self,
        x_NH: Tensor,
        w_EFH: Tensor,
        counts: list[int],
        out_NF: Tensor | None = None,
        *,
        gradient: bool = False,
    ) -> Tensor:
        """See GroupedLinears."""
        if out_NF is None:
            out_NF = x_NH.new_empty((x_NH.shape[0], w_EFH.shape[1]))
        parts = zip(x_NH.split(counts), w_EFH.unbind(), out_NF.split(counts), strict=True)
        for x, w, out in parts:
            torch.mm(x, w.t(), out=out)
        return out_NF

    def rows_by_hidden(
        self, counts: list[int], *products: tuple[Tensor, Tensor], gradient: bool = False
    ) -> Tensor:
        """See GroupedLinears."""
        first_NF, first_EFH = products[0]
        y_NH = first_NF.new_empty((first_NF.shape[0], first_EFH.shape[2]))
        for order, (v_NF, w_EFH) in enumerate(products):
            parts = zip(v_NF.split(counts), w_EFH.unbind(), y_NH.split(counts), strict=True)
            for v, w, y in parts:
                torch.addmm(y, v, w, beta=min(order, 1), out=y)
        return y_NH

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, counts: list[int], *, gradient: Literal["v", "x"]
    ) -> Tensor:
        """See GroupedLinears."""
        dw_EFH = x_NH.new_empty((len(counts), v_NF.shape[1], x_NH.shape[1]))
        for v, x, dw in zip(v_NF.split(counts), x_NH.split(counts), dw_EFH.unbind(), strict=True):
            torch.mm(v.t(), x, out=dw)
        return dw_EFH


def weight_grads(
    linears: GroupedLinears,
    counts: list[int],
    rows_NF: tuple[Tensor, Tensor, Tensor],
    x_NH: Tensor,
    dy_NH: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """dW of gate, up and down from (da, du, h) [N, F] and x, dy [N, H]; None where not wanted."""
    da_NF, du_NF, h_NF = rows_NF
    makers: tuple[Callable[[], Tensor], ...] = (
        lambda: linears.weight_grad(da_NF, x_NH, counts, gradient="v"),
        lambda: linears.weight_grad(du_NF, x_NH, counts, gradient="v"),
        lambda: linears.weight_grad(h_NF, dy_NH, counts, gradient="x"),
    )
    return [make() if want else None for make, want in zip(makers, wanted, strict=True)]
