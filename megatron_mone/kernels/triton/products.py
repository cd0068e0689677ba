"""The grouped products of an expert layer behind one interface: our kernels over all neurons, or
over kept blocks alone; these with torch's over two of every four neurons; or another library's.

    gate          a [N, F] = x W_gate^T
    up            u of the kept entries [N, S], h = p sigma(a) u [N, F] zero elsewhere
    down          y [N, H] = h W_down, rows that are not finite marked
    dh            da, du, h [N, F], dp [N] from dy
    dx            da W_gate + du W_up [N, H]
    weight_grad   out [E, F, H] (+)= v^T x
By segments h, da and du are `Values` instead, of two of four `TwoFour`, and of few rows (decode.py,
forward alone) h is `UnionValues`; nobody else looks at them.
Shapes: N rows, E experts, F neurons of an expert, H hidden, S kept. Plain torch.
"""

from typing import Literal, Protocol

from torch import Tensor

from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.triton import ops, segments, two_four
from megatron_mone.kernels.triton.decode import DecodeProducts
from megatron_mone.kernels.triton.ops import Entries
from megatron_mone.kernels.triton.row_map import RowMap
from megatron_mone.kernels.triton.segments import Segments, Values, segments_of, takes_segments
from megatron_mone.kernels.triton.two_four import SparseGemm, TwoFour


class GroupedLinears(Protocol):
    """What a GEMM library has to give: dense products, expert by expert, in the operands' dtype.

    Every weight is neuron-major, so these three serve the forward and the backward pass alike.
    `gradient` says which rows are gradients: fp8 recipes hold those in a format of their own.
    """

    def rows_by_neurons(self, x_NH: Tensor, w_EFH: Tensor, *, gradient: bool = False) -> Tensor:
        """[N, F] x W^T."""
        ...

    def rows_by_hidden(self, *products: tuple[Tensor, Tensor], gradient: bool = False) -> Tensor:
        """[N, H] sum of v W over the products (v_NF, w_EFH)."""
        ...

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, out_EFH: Tensor, adds: bool, gradient: Literal["v", "x"]
    ) -> None:
        """out [E, F, H] (+)= v^T x; `out` of the operands' dtype or float32, each [F, H] of it
        contiguous. Without `adds`, zero for experts without rows."""
        ...


class KernelLinears:
    """GroupedLinears by our kernels."""

    def __init__(self, where: RowMap) -> None:
        self.where = where

    def rows_by_neurons(self, x_NH: Tensor, w_EFH: Tensor, *, gradient: bool = False) -> Tensor:
        """See GroupedLinears."""
        return ops.gate_product(x_NH, w_EFH, self.where)

    def rows_by_hidden(self, *products: tuple[Tensor, Tensor], gradient: bool = False) -> Tensor:
        """See GroupedLinears."""
        return ops.hidden_product(self.where, *products)

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, out_EFH: Tensor, adds: bool, gradient: Literal["v", "x"]
    ) -> None:
        """See GroupedLinears."""
        ops.weight_grad(v_NF, x_NH, out_EFH, adds, self.where)


class KernelProducts:
    """Our kernels: what MoNE adds happens on a product's tiles."""

    def __init__(self, where: RowMap, activation: str) -> None:
        self.where, self.activation = where, activation

    def gate(self, x_NH: Tensor, w_EFH: Tensor) -> Tensor:
        """K1."""
        return ops.gate_product(x_NH, w_EFH, self.where)

    def up(
        self, x_NH: Tensor, w_EFH: Tensor, p_N: Tensor, entries: Entries
    ) -> tuple[Tensor, Tensor]:
        """K3."""
        return ops.up_product(x_NH, w_EFH, p_N, entries, self.activation, self.where)

    def down(self, h_NF: Tensor, w_EFH: Tensor, bad_N: Tensor) -> Tensor:
        """K4."""
        return ops.hidden_product(self.where, (h_NF, w_EFH), bad_N=bad_N)

    def dh(
        self, dy_NH: Tensor, w_EFH: Tensor, p_N: Tensor, kept: ops.Kept, dg_NS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K6."""
        return ops.dh_product(dy_NH, w_EFH, p_N, kept, dg_NS, self.activation, self.where)

    def dx(self, gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> Tensor:
        """K7."""
        return ops.hidden_product(self.where, gate, up)

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, out_EFH: Tensor, adds: bool, gradient: Literal["v", "x"]
    ) -> None:
        """K8."""
        ops.weight_grad(v_NF, x_NH, out_EFH, adds, self.where)


class SegmentProducts:
    """Our kernels over the blocks that rows keep, K9; the gate over all neurons."""

    def __init__(self, where: RowMap, activation: str, block: int, slots: int) -> None:
        self.where, self.activation, self.block, self.slots = where, activation, block, slots

    def gate(self, x_NH: Tensor, w_EFH: Tensor) -> Tensor:
        """See KernelProducts."""
        return ops.gate_product(x_NH, w_EFH, self.where)

    def up(
        self, x_NH: Tensor, w_EFH: Tensor, p_N: Tensor, entries: Entries
    ) -> tuple[Tensor, Values]:
        """See KernelProducts."""
        found = self._segments(entries.words_NW, entries.bases_NW, w_EFH)
        return segments.up_product(x_NH, w_EFH, p_N, entries.a_NS, found, self.activation)

    def down(self, h: Values, w_EFH: Tensor, bad_N: Tensor) -> Tensor:
        """See KernelProducts."""
        return segments.hidden_product(self.where, (h, w_EFH), bad_N=bad_N)

    def dh(
        self, dy_NH: Tensor, w_EFH: Tensor, p_N: Tensor, kept: ops.Kept, dg_NS: Tensor | None
    ) -> tuple[Values, Values, Values, Tensor]:
        """See KernelProducts. Pairs are sorted again: 4 Q bytes a row less are kept."""
        found = self._segments(kept.words_NW, kept.bases_NW, w_EFH)
        return segments.dh_product(
            dy_NH, w_EFH, p_N, kept, dg_NS, found, self.activation, self.where
        )

    def dx(self, gate: tuple[Values, Tensor], up: tuple[Values, Tensor]) -> Tensor:
        """See KernelProducts."""
        return segments.hidden_product(self.where, gate, up)

    def weight_grad(
        self, v: Values, x_NH: Tensor, out_EFH: Tensor, adds: bool, gradient: Literal["v", "x"]
    ) -> None:
        """See KernelProducts."""
        segments.weight_grad(v, x_NH, out_EFH, adds)

    def _segments(self, words_NW: Tensor, bases_NW: Tensor, w_EFH: Tensor) -> Segments:
        return segments_of(words_NW, bases_NW, self.block, self.slots, w_EFH.shape[1], self.where)


class TwoFourProducts:
    """Down and dx by torch's product of rows that keep two of every four neurons, the other seven
    by our kernels. An expert at a time: O(E) launches, and `counts` of rows on the host."""

    def __init__(self, gemm: SparseGemm, counts: list[int], where: RowMap, activation: str) -> None:
        self.gemm, self.counts, self.where, self.activation = gemm, counts, where, activation
        self.dense = KernelProducts(where, activation)

    def gate(self, x_NH: Tensor, w_EFH: Tensor) -> Tensor:
        """See KernelProducts."""
        return self.dense.gate(x_NH, w_EFH)

    def up(
        self, x_NH: Tensor, w_EFH: Tensor, p_N: Tensor, entries: Entries
    ) -> tuple[Tensor, TwoFour]:
        """See KernelProducts."""
        u_NS, h_NF = self.dense.up(x_NH, w_EFH, p_N, entries)
        return u_NS, TwoFour(h_NF, entries.words_NW)

    def down(self, h: TwoFour, w_EFH: Tensor, bad_N: Tensor) -> Tensor:
        """See KernelProducts."""
        y_NH = two_four.hidden_product(self.gemm, self.counts, self.where, (h, w_EFH))
        ops.mark_bad(y_NH, bad_N, self.where)
        return y_NH

    def dh(
        self, dy_NH: Tensor, w_EFH: Tensor, p_N: Tensor, kept: ops.Kept, dg_NS: Tensor | None
    ) -> tuple[TwoFour, TwoFour, TwoFour, Tensor]:
        """See KernelProducts."""
        *wide, dp_N = self.dense.dh(dy_NH, w_EFH, p_N, kept, dg_NS)
        da, du, h = (TwoFour(v_NF, kept.words_NW) for v_NF in wide)
        return da, du, h, dp_N

    def dx(self, gate: tuple[TwoFour, Tensor], up: tuple[TwoFour, Tensor]) -> Tensor:
        """See KernelProducts."""
        return two_four.hidden_product(self.gemm, self.counts, self.where, gate, up)

    def weight_grad(
        self, v: TwoFour, x_NH: Tensor, out_EFH: Tensor, adds: bool, gradient: Literal["v", "x"]
    ) -> None:
        """See KernelProducts."""
        self.dense.weight_grad(v.wide_NF, x_NH, out_EFH, adds, gradient)


class LinearProducts:
    """Another library's dense products; what MoNE adds is a kernel behind each."""

    def __init__(self, linears: GroupedLinears, where: RowMap, activation: str) -> None:
        self.linears, self.where, self.activation = linears, where, activation

    def gate(self, x_NH: Tensor, w_EFH: Tensor) -> Tensor:
        """See KernelProducts."""
        return self.linears.rows_by_neurons(x_NH, w_EFH)

    def up(
        self, x_NH: Tensor, w_EFH: Tensor, p_N: Tensor, entries: Entries
    ) -> tuple[Tensor, Tensor]:
        """See KernelProducts."""
        wide_NF = self.linears.rows_by_neurons(x_NH, w_EFH)
        return ops.up_entries(wide_NF, p_N, entries, self.activation, self.where)

    def down(self, h_NF: Tensor, w_EFH: Tensor, bad_N: Tensor) -> Tensor:
        """See KernelProducts."""
        y_NH = self.linears.rows_by_hidden((h_NF, w_EFH))
        ops.mark_bad(y_NH, bad_N, self.where)
        return y_NH

    def dh(
        self, dy_NH: Tensor, w_EFH: Tensor, p_N: Tensor, kept: ops.Kept, dg_NS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See KernelProducts."""
        wide_NF = self.linears.rows_by_neurons(dy_NH, w_EFH, gradient=True)
        return ops.dh_entries(wide_NF, p_N, kept, dg_NS, self.activation, self.where)

    def dx(self, gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> Tensor:
        """See KernelProducts."""
        return self.linears.rows_by_hidden(gate, up, gradient=True)

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, out_EFH: Tensor, adds: bool, gradient: Literal["v", "x"]
    ) -> None:
        """See KernelProducts."""
        self.linears.weight_grad(v_NF, x_NH, out_EFH, adds, gradient)


Products = KernelProducts | SegmentProducts | TwoFourProducts | LinearProducts | DecodeProducts


def our_products(choose: Selection | NeuronMask, where: RowMap, activation: str) -> Products:
    """Our kernels by segments where a row keeps few blocks, else over all neurons."""
    block, kept = choose.block, choose.kept
    assert kept is not None
    if takes_segments(block, kept):
        return SegmentProducts(where, activation, block, kept // block)
    return KernelProducts(where, activation)
