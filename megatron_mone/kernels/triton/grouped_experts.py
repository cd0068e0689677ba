"""The masked grouped expert MLP in Triton, for any choice of neurons that is S in every row.

A choice without structure gives a tensor core nothing to skip, so the products are dense, grouped
over experts, and what MoNE adds happens on their tiles; few blocks of neurons go by K9 instead:
    K0  row map                 K1  a = x W_gate^T [N, F]
    K2  bits, a of the kept     K3  u of the kept [N, S], h = p sigma(a) u [N, F] zero elsewhere
    K4  y = h W_down, rows that are not finite
backward, from x, p, a, u [N, S] and bits [N, F / 8]:
    rebuild                     K6  dh = dy W_down^T: da, du, h [N, F], dp; the balance loss's slope
    K7  dx                      K8  weight gradients, into main_grad where Megatron adds up there
    K9  rows of at most 4 blocks: pairs sorted by (expert, block), K3 to K8 over kept blocks alone,
        h, da, du [N, S]; float32 parts [N, Q, H] of y and dx where a row keeps Q > 1
Few rows that need no gradients go by D1 to D3 (decode.py).
The number of launches does not depend on the number of experts, and no count comes to the host: N
is a bound, rows past the last expert's are not touched.
Not run on a GPU yet. Shapes: N rows grouped by expert, E experts, F neurons, H hidden, S kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_mone.common.phases import GATE_GEMM, SELECTION, UP_DOWN_GEMM, enter
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.triton import decode, ops
from megatron_mone.kernels.triton.decode import DecodeProducts, takes_decode
from megatron_mone.kernels.triton.ops import Blocks, BlockSums, Counters, Entries, Slope, Weighing
from megatron_mone.kernels.triton.products import Products, our_products
from megatron_mone.kernels.triton.row_map import RowMap, row_map
from megatron_mone.kernels.weight_views import gradient_goals, later_of, sinks_of


@dataclass
class _Call:
    """What the two passes of one call share beside tensors with gradient.

    Attributes:
        products: of its rows.
        entries: chosen in the forward pass, with what is not kept for backward.
        slope: of the balance loss; there once the backward pass of `attach` ran.
    """

    products: Products
    etp_group: ProcessGroup | None = None
    entries: Entries | None = None
    slope: Slope | None = None


@dataclass(frozen=True)
class KeptEntries:
    """The kept entries of a forward pass, for a balance loss: sums now, slope where da is made."""

    entries: Entries
    call: _Call
    neurons: int

    @property
    def where(self) -> RowMap:
        """Of the rows."""
        return self.call.products.where

    @property
    def bad_N(self) -> Tensor:
        """[N] int8, 1 for rows of y with a NaN or an infinity."""
        return self.entries.bad_N

    @torch.no_grad()
    def block_sums(
        self, blocks: Blocks, *, shares: bool, scale_free: bool, counters: Counters | None = None,
        weighing: Weighing | None = None,
    ) -> BlockSums:  # fmt: skip
        """See ops.block_sums; T_n is of all neurons of a row, over expert tensor ranks."""
        if shares and scale_free and _several(self.call.etp_group):
            _sum_over(self.call.etp_group, self.entries.total_N)
        return ops.block_sums(
            self.entries, blocks, self.where, neurons=self.neurons,
            activation=self.call.products.activation, shares=shares, scale_free=scale_free,
            counters=counters, weighing=weighing,
        )  # fmt: skip

    @torch.no_grad()
    def note_bad(self, probs_N: Tensor, first_EX: Tensor, call: int) -> None:
        """See ops.note_bad."""
        ops.note_bad(self.bad_N, probs_N, first_EX, call, self.where)

    def attach(self, y_NH: Tensor, slope: Slope) -> Tensor:
        """y, whose backward pass also gives the gates the gradient that `slope` describes."""
        return _Attach.apply(y_NH, self.call, slope)


class _Attach(torch.autograd.Function):
    """Identity; its backward pass runs before that of the experts, and leaves them the slope."""

    @staticmethod
    def forward(ctx: Any, y_NH: Tensor, call: _Call, slope: Slope) -> Tensor:
        ctx.call, ctx.slope = call, slope
        return y_NH.view_as(y_NH)

    @staticmethod
    def backward(ctx: Any, dy_NH: Tensor):
        ctx.call.slope = ctx.slope
        return dy_NH, None, None


def masked_experts(
    x_NH: Tensor,
    probs_N: Tensor,
    counts: Tensor,
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    choose: Selection | NeuronMask,
    activation: str,
    etp_group: ProcessGroup | None = None,
    products: Callable[[RowMap, str], Products] | None = None,
) -> tuple[Tensor, NeuronMask, KeptEntries]:
    """Run the routed rows through their experts, with S neurons in each row.

    Args:
        x_NH: [N, H] rows grouped by expert, float32 or bfloat16; N a bound.
        probs_N: [N] router probabilities, any float dtype.
        counts: [E] or [E, R] integers on x's device: rows of each expert, or by source.
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype; copied where
            an expert's [F, H] is not contiguous.
        choose: a selection, or a mask whose rows all keep the same number (`kept`).
        activation: silu, sigmoid, gelu (by erf), relu or squared_relu.
        etp_group: ranks that hold the other neurons of the same experts.
        products: of rows and an activation, another library's products; our kernels when None.

    Returns:
        y_NH: [N, H] outputs, the router's probability applied.
        mask: the neurons computed.
        kept: for a balance loss.

    Raises:
        RuntimeError: triton is missing or has no device (see `available`).
        ValueError: rows wider than the selection kernel takes.
    """
    given = (x_NH, probs_N, w_gate_EFH, w_up_EFH, w_down_EFH)
    needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    rows = x_NH.shape[0]
    made: Products
    if products is not None:
        made = products(row_map(counts, rows), activation)
    elif not needs_gradients and takes_decode(rows, w_gate_EFH.shape[0]):
        made = DecodeProducts(row_map(counts, rows, decode.TILE), activation)
    else:
        made = our_products(choose, row_map(counts, rows), activation)
    call = _Call(made, etp_group)
    weights = [_neuron_major(w) for w in (w_gate_EFH, w_up_EFH, w_down_EFH)]
    y_NH, words_NW = _MaskedExperts.apply(x_NH, probs_N, *weights, choose, call)
    entries, call.entries = call.entries, None
    assert entries is not None
    neurons = w_gate_EFH.shape[1]
    if isinstance(choose, NeuronMask):
        mask = choose
    else:
        mask = NeuronMask.of_words(words_NW, neurons, choose.block, choose.kept)
    return y_NH, mask, KeptEntries(entries, call, neurons)


def _neuron_major(w_EFH: Tensor) -> Tensor:
    """The weight as kernels address it: [F, H] contiguous, experts any stride apart."""
    fits = w_EFH.stride()[1:] == (w_EFH.shape[2], 1)
    return _aligned(w_EFH if fits else w_EFH.contiguous())


def _aligned(t: Tensor) -> Tensor:
    """The tensor, at a multiple of 16 bytes, which TMA asks for; torch allocates so, and a view may
    begin elsewhere."""
    return t.clone() if t.storage_offset() * t.element_size() % 16 else t


class _MaskedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH, probs_N, w_gate, w_up, w_down, choose, call: _Call):
        x_NH, p_N = _aligned(x_NH.contiguous()), probs_N.contiguous()
        products: Any = call.products  # h, da and du are of the kind that it takes
        where, activation = products.where, products.activation
        enter(GATE_GEMM)
        a_NF = products.gate(x_NH, w_gate)
        enter(SELECTION)
        if isinstance(choose, Selection):
            entries = ops.select(a_NF, choose, activation, where)
        else:
            entries = ops.compact(a_NF, choose.words(), choose.kept, activation, where)
        del a_NF
        enter(UP_DOWN_GEMM)
        u_NS, h = products.up(x_NH, w_up, p_N, entries)
        y_NH = products.down(h, w_down, entries.bad_N)
        weights = (w_gate, w_up, w_down)
        ctx.save_for_backward(x_NH, p_N, *weights, entries.a_NS, u_NS, entries.words_NW)
        ctx.call, ctx.sinks, ctx.later = call, sinks_of(weights), later_of(weights)
        call.entries = entries
        ctx.mark_non_differentiable(entries.words_NW)
        ctx.set_materialize_grads(False)
        return y_NH, entries.words_NW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH, _words):
        x_NH, p_N, w_gate, w_up, w_down, a_NS, u_NS, words_NW = ctx.saved_tensors
        enter(UP_DOWN_GEMM)
        products, slope, group = ctx.call.products, ctx.call.slope, ctx.call.etp_group
        dy_NH = torch.zeros_like(x_NH) if dy_NH is None else _aligned(dy_NH.contiguous())
        sum_over = partial(_sum_over, group) if _several(group) else None
        bases_NW, dg_NS = ops.rebuild(
            words_NW, a_NS, slope, products.activation, products.where, sum_over
        )
        kept = ops.Kept(a_NS, u_NS, words_NW, bases_NW)
        da, du, h, dp_N = products.dh(dy_NH, w_down, p_N, kept, dg_NS)
        del kept, bases_NW, dg_NS, a_NS, u_NS, words_NW
        ctx.maybe_clear_saved_tensors()
        dx_NH = None
        if ctx.needs_input_grad[0]:
            dx_NH = products.dx((da, w_gate), (du, w_up))
        goals = gradient_goals(
            (w_gate, w_up, w_down), ctx.sinks, ctx.needs_input_grad[2:5], _new(x_NH)
        )
        terms = ((da, x_NH), (du, x_NH), (h, dy_NH))
        make = partial(_weight_grads, products, terms, goals)
        if ctx.later is None:
            dw = make()
        else:
            ctx.later.append(make)
            dw = [None] * 3
        return dx_NH, dp_N, *dw, None, None


def _weight_grads(products: Any, terms, goals) -> list[Tensor | None]:
    """Of gate, up and down: a new gradient; None where none is wanted or a sink took it."""
    made: list[Tensor | None] = []
    kinds: tuple[Literal["v", "x"], ...] = ("v", "v", "x")
    for (v, x_NH), goal, gradient in zip(terms, goals, kinds, strict=True):
        made.append(None)
        if goal is not None:
            out_EFH, adds = goal()
            products.weight_grad(v, x_NH, out_EFH, adds, gradient)
            made[-1] = None if adds else out_EFH
    return made


def _new(like: Tensor):
    return lambda shape, dtype: like.new_empty(shape, dtype=dtype)


def _sum_over(group: ProcessGroup | None, *parts_N: Tensor) -> None:
    """Add up over the ranks of `group`, in place."""
    for part_N in parts_N:
        torch.distributed.all_reduce(part_N, group=group)


def _several(group: ProcessGroup | None) -> bool:
    return group is not None and group.size() > 1
