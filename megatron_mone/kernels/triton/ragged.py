"""The masked grouped expert MLP over rows of any length, in plain torch around dense products.

For masks whose rows keep different numbers of neurons (threshold, cut over expert tensor ranks,
replayed): the kernels hold S entries in each row. The products are dense, and the kept entries are
picked from and spread into [N, F] by their int64 positions, made anew in each pass:
    a = x W_gate^T, u = x W_up^T     dense; a, u picked where kept
    h = p sigma(a) u                 [K], spread into zeros [N, F]
    y = h W_down                     dense
Costs the dense expert's arithmetic and, beside it, a pass of torch operations over K entries each
(some twenty where the kernels read once), K x 8 bytes of positions, and a copy of the number of
entries to the host. Saved beside x, p and the weights: a, u and the mask; nothing of width F. Sums
are over rows of [N, F], so the same bits on every run.
Not run on a GPU yet. Shapes: N rows grouped by expert, E experts, F neurons, H hidden, K kept.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mone.common.phases import GATE_GEMM, SELECTION, UP_DOWN_GEMM, enter
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.operands import apply_rule
from megatron_mone.kernels.triton.products import GroupedLinears
from megatron_mone.kernels.weight_views import later_of

# v and x of a weight's gradient v^T x, which of the two is a gradient, whether the weight wants one
Terms = list[tuple[Tensor, Tensor, Literal["v", "x"], bool]]


def ragged_grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    choose: Choose,
    activation: str,
    linears: GroupedLinears,
) -> tuple[Tensor, NeuronMask, Tensor]:
    """Run the routed rows through the chosen neurons of their experts.

    Args:
        x_NH: [N, H] rows grouped by expert.
        probs_N: [N] router probabilities, any float dtype.
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype.
        choose: a selection, a mask or a rule.
        activation: an elementwise one: silu, sigmoid, gelu (by erf), relu or squared_relu.
        linears: of the dense products.

    Returns:
        y_NH [N, H], the router's probability applied; the mask; gate_K [K] sigma(a) of its
        entries, with gradient.
    """
    y_NH, gate_K, indices_K, offsets_N1 = _RaggedGroupedMLP.apply(
        x_NH, probs_N, w_gate_EFH, w_up_EFH, w_down_EFH, choose, activation, linears
    )
    if isinstance(choose, NeuronMask):
        return y_NH, choose, gate_K
    block = choose.block if isinstance(choose, Selection) else 1
    return y_NH, NeuronMask.unchecked(indices_K, offsets_N1, w_gate_EFH.shape[1], block), gate_K


class _RaggedGroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH, probs_N, w_gate, w_up, w_down, choose, activation, linears):
        x_NH, weights = x_NH.contiguous(), (w_gate, w_up, w_down)
        enter(GATE_GEMM)
        a_NF = linears.rows_by_neurons(x_NH, w_gate)
        enter(SELECTION)
        entries = _Entries(_mask(choose, a_NF, activation))
        a_K = entries.pick(a_NF)
        enter(UP_DOWN_GEMM)
        u_K = entries.pick(linears.rows_by_neurons(x_NH, w_up))
        gate_K = gate_activation(activation, a_K)
        h_K = entries.of_rows(probs_N) * gate_K.float() * u_K.float()
        y_NH = linears.rows_by_hidden((entries.spread(h_K.to(x_NH.dtype)), w_down))
        indices_K, offsets_N1 = entries.mask.indices_K, entries.mask.offsets_N1
        ctx.save_for_backward(x_NH, probs_N, *weights, a_K, u_K, indices_K, offsets_N1)
        ctx.activation, ctx.linears, ctx.later = activation, linears, later_of(weights)
        ctx.mark_non_differentiable(indices_K, offsets_N1)
        ctx.set_materialize_grads(False)
        return y_NH, gate_K, indices_K, offsets_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH, dgate_K, _indices, _offsets):
        enter(UP_DOWN_GEMM)
        x_NH, probs_N, *weights, a_K, u_K, indices_K, offsets_N1 = ctx.saved_tensors
        w_gate, w_up, w_down = weights
        linears, dtype = ctx.linears, x_NH.dtype
        entries = _Entries(NeuronMask.unchecked(indices_K, offsets_N1, w_gate.shape[1]))
        dy_NH = torch.zeros_like(x_NH) if dy_NH is None else dy_NH.contiguous()
        dh_K = entries.pick(linears.rows_by_neurons(dy_NH, w_down, gradient=True)).float()
        p_K, u_K = entries.of_rows(probs_N), u_K.float()
        with torch.enable_grad():
            a_K = a_K.float().requires_grad_()
            sigma_K = gate_activation(ctx.activation, a_K)
        g_K = sigma_K.detach().to(dtype).float()  # rounded, as the forward pass used it
        dg_K = p_K * u_K * dh_K
        dg_K = dg_K if dgate_K is None else dg_K + dgate_K.float()
        (da_K,) = torch.autograd.grad(sigma_K, a_K, dg_K)
        dp_N = entries.spread(g_K * u_K * dh_K).sum(dim=1).to(probs_N.dtype)
        da_NF, du_NF, h_NF = (
            entries.spread(v_K.to(dtype)) for v_K in (da_K, p_K * g_K * dh_K, p_K * g_K * u_K)
        )
        dx_NH = None
        if ctx.needs_input_grad[0]:
            dx_NH = linears.rows_by_hidden((da_NF, w_gate), (du_NF, w_up), gradient=True)
        wanted = ctx.needs_input_grad[2:5]
        terms: Terms = [
            (da_NF, x_NH, "v", wanted[0]), (du_NF, x_NH, "v", wanted[1]),
            (h_NF, dy_NH, "x", wanted[2]),
        ]  # fmt: skip
        make = partial(_weight_grads, linears, terms, w_gate)
        dw: list[Tensor | None] = [None] * 3
        if ctx.later is None:
            dw = make()
        else:
            ctx.later.append(make)
        return dx_NH, dp_N, *dw, None, None, None


def _weight_grads(linears: GroupedLinears, terms: Terms, like_EFH: Tensor) -> list[Tensor | None]:
    """Of gate, up and down; None where none is wanted."""
    made: list[Tensor | None] = []
    for v_NF, x_NH, kind, wanted in terms:
        made.append(like_EFH.new_empty(like_EFH.shape) if wanted else None)
        if made[-1] is not None:
            linears.weight_grad(v_NF, x_NH, made[-1], False, kind)
    return made


class _Entries:
    """The kept entries of a mask as positions in [N, F]."""

    def __init__(self, mask: NeuronMask) -> None:
        self.mask = mask
        self.size = (mask.num_rows, mask.num_neurons)
        self.at_K = mask.rows_K * mask.num_neurons + mask.indices_K

    def pick(self, wide_NF: Tensor) -> Tensor:
        """[K] the entries of [N, F]."""
        return wide_NF.reshape(-1)[self.at_K]

    def spread(self, value_K: Tensor) -> Tensor:
        """[N, F] zeros but for the entries."""
        wide = value_K.new_zeros(self.size[0] * self.size[1])
        return wide.index_copy_(0, self.at_K, value_K).view(self.size)

    def of_rows(self, value_N: Tensor) -> Tensor:
        """[K] float32, each entry's row's value."""
        return value_N.float()[self.mask.rows_K]


def _mask(choose: Choose, a_NF: Tensor, activation: str) -> NeuronMask:
    if isinstance(choose, NeuronMask):
        return choose
    block = choose.block if isinstance(choose, Selection) else 1
    return NeuronMask.from_bool(apply_rule(choose, gate_activation(activation, a_NF)), block)
