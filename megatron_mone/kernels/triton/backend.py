"""The Triton backend of the masked grouped expert MLP, for any choice of neurons (block = 1).

A choice without structure gives a tensor core nothing to skip. So the products of training shapes
stay dense GEMMs, one for each expert, around the two kernels that make the rest cheap:
    a = x W_gate^T    dense      select.py: exact top-S, a and index of the kept entries
    u = x W_up^T      dense      gated.py: h = p sigma(a) u where kept, u of the kept entries
    y = h W_down      dense, h zero elsewhere
Nothing of width F outlives the call: saved beside x, p and the weights are a, u and the index of
the kept entries (MONE.md, "What it costs"). The arithmetic is the dense expert's. Without gradients
and with few rows (decoding) up and down are gathered, and sparse, instead.
Not run on a GPU yet. Shapes: N rows grouped by expert, E experts, F neurons, H hidden, S kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mone.kernels.triton.arguments import check, expert_of_row, uniform_mask
from megatron_mone.kernels.triton.availability import kernels
from megatron_mone.moe.neuron_mask import NeuronMask


def masked_grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    counts: Sequence[int],
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    kept: int,
    groups: int = 1,
    activation: str,
) -> tuple[Tensor, NeuronMask, Tensor]:
    """Run the routed rows through their experts with the `kept` largest |gate| of each row.

    Args:
        x_NH: [N, H] rows grouped by expert, float32 or bfloat16.
        probs_N: [N] router probabilities, any float dtype.
        counts: E row counts that sum to N.
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype.
        kept: S neurons of each row.
        groups: G equal contiguous groups of the F neurons; each keeps S / G.
        activation: silu, sigmoid, gelu (by erf) or relu.

    Returns:
        y_NH: [N, H] outputs, the router's probability applied.
        mask: the neurons computed.
        gate_K: [N * S] sigma(a) of the kept entries in the mask's order, with gradient.

    Raises:
        RuntimeError: triton is missing or has no device (see `available`).
        ValueError: a dtype, shape, name or count that this backend does not take.
    """
    counts = [int(count) for count in counts]
    weights = (w_gate_EFH, w_up_EFH, w_down_EFH)
    check(x_NH, probs_N, counts, weights, activation)
    differentiable = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x_NH, probs_N, *weights)
    )
    gathered = not differentiable and gathering_pays(counts, kept, w_gate_EFH.shape[1])
    y_NH, gate_K, index_NS = _MaskedGroupedMLP.apply(
        x_NH, probs_N, *weights, counts, kept, groups, activation, gathered
    )
    return y_NH, uniform_mask(index_NS, w_gate_EFH.shape[1]), gate_K


def gathering_pays(counts: Sequence[int], kept: int, neurons: int) -> bool:
    """Whether gathered weight rows are fewer than the dense ones: N S < F x experts with rows."""
    return sum(counts) * kept < neurons * sum(count > 0 for count in counts)


class _MaskedGroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NH, probs_N, w_gate, w_up, w_down, counts, kept, groups, activation, gathered
    ):
        gated, select = kernels("gated", "select")
        x_NH, weights = x_NH.contiguous(), [w.contiguous() for w in (w_gate, w_up, w_down)]
        p_N = probs_N.contiguous()
        wide_NF = _rows_by_neurons(x_NH, weights[0], counts)
        index_NS, a_NS = select.select_neurons(wide_NF, kept, groups, activation)
        rule = {"activation": activation, "scattered": not gathered}
        if gathered:
            sampled, sparse = kernels("sampled_up", "sparse_down")
            expert_N = expert_of_row(counts, x_NH.device)
            u_NS = sampled.sampled_up(x_NH, weights[1], expert_N, index_NS)
            gate_NS, u_NS, h_NS = gated.gate_forward(a_NS, u_NS, p_N, index_NS, **rule)
            y_NH = sparse.sparse_down(h_NS, weights[2], expert_N, index_NS)
        else:
            _rows_by_neurons(x_NH, weights[1], counts, out_NF=wide_NF)
            gate_NS, u_NS, h_NF = gated.gate_forward(a_NS, wide_NF, p_N, index_NS, **rule)
            y_NH = _rows_by_hidden(counts, (h_NF, weights[2]))
        ctx.save_for_backward(x_NH, p_N, *weights, a_NS, u_NS, index_NS)
        ctx.counts, ctx.activation = counts, activation
        ctx.mark_non_differentiable(index_NS)
        ctx.set_materialize_grads(False)
        return y_NH, gate_NS.view(-1), index_NS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH, dgate_K, _index):
        (gated,) = kernels("gated")
        x_NH, p_N, w_gate, w_up, w_down, a_NS, u_NS, index_NS = ctx.saved_tensors
        counts = ctx.counts
        dy_NH = torch.zeros_like(x_NH) if dy_NH is None else dy_NH.contiguous()
        dh_NF = _rows_by_neurons(dy_NH, w_down, counts)
        da_NF, du_NF, h_NF, dp_N = gated.gate_backward(
            a_NS, u_NS, p_N, index_NS, dh_NF, dgate_K, activation=ctx.activation, scattered=True
        )
        dx_NH = None
        if ctx.needs_input_grad[0]:
            dx_NH = _rows_by_hidden(counts, (da_NF, w_gate), (du_NF, w_up))
        products = ((da_NF, x_NH), (du_NF, x_NH), (h_NF, dy_NH))
        dw = [
            _weight_grad(*product, counts) if wanted else None
            for product, wanted in zip(products, ctx.needs_input_grad[2:5], strict=True)
        ]
        return dx_NH, dp_N.to(p_N.dtype), *dw, None, None, None, None, None


def _rows_by_neurons(
    x_NH: Tensor, w_EFH: Tensor, counts: list[int], out_NF: Tensor | None = None
) -> Tensor:
    """[N, F] = x W^T, expert by expert."""
    if out_NF is None:
        out_NF = x_NH.new_empty((x_NH.shape[0], w_EFH.shape[1]))
    parts = zip(x_NH.split(counts), w_EFH.unbind(), out_NF.split(counts), strict=True)
    for x, w, out in parts:
        torch.mm(x, w.t(), out=out)
    return out_NF


def _rows_by_hidden(counts: list[int], *products: tuple[Tensor, Tensor]) -> Tensor:
    """[N, H] = sum of v W over the products, expert by expert."""
    first_NF, first_EFH = products[0]
    y_NH = first_NF.new_empty((first_NF.shape[0], first_EFH.shape[2]))
    for order, (v_NF, w_EFH) in enumerate(products):
        parts = zip(v_NF.split(counts), w_EFH.unbind(), y_NH.split(counts), strict=True)
        for v, w, y in parts:
            torch.addmm(y, v, w, beta=min(order, 1), out=y)
    return y_NH


def _weight_grad(v_NF: Tensor, x_NH: Tensor, counts: list[int]) -> Tensor:
    """[E, F, H] = v^T x, expert by expert."""
    dw_EFH = x_NH.new_empty((len(counts), v_NF.shape[1], x_NH.shape[1]))
    for v, x, dw in zip(v_NF.split(counts), x_NH.split(counts), dw_EFH.unbind(), strict=True):
        torch.mm(v.t(), x, out=dw)
    return dw_EFH
