"""The masked grouped expert MLP in Triton, for any choice of neurons that is S in every row.

A choice without structure gives a tensor core nothing to skip. So the products of training shapes
stay dense GEMMs, one for each expert, around the two kernels that make the rest cheap:
    a = x W_gate^T    dense      select.py: exact top-S, a and index of the kept entries
    u = x W_up^T      dense      gated.py: h = p sigma(a) u where kept, u of the kept entries
    y = h W_down      dense, h zero elsewhere
Nothing of width F outlives the call: saved beside x, p and the weights are a, u and the index of
the kept entries (docs/MODEL.md, "Cost"). The arithmetic is the dense expert's. Without gradients
and with few rows (decoding) up and down are gathered, and sparse, instead.
Not run on a GPU yet. Shapes: N rows grouped by expert, E experts, F neurons, H hidden, S kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mone.common.phases import GATE_GEMM, SELECTION, UP_DOWN_GEMM, enter
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.triton.arguments import (
    expert_of_row,
    neuron_major,
    uniform_mask,
    uniform_rows,
)
from megatron_mone.kernels.triton.availability import kernels
from megatron_mone.kernels.triton.blocks import choose_blocks, neurons_of_blocks
from megatron_mone.kernels.triton.linears import GroupedLinears, MatmulLinears, weight_grads


def masked_grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    counts: Sequence[int],
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    choose: Selection | NeuronMask,
    activation: str,
    linears: GroupedLinears | None = None,
) -> tuple[Tensor, NeuronMask, Tensor]:
    """Run the routed rows through their experts, with S neurons in each row.

    Args:
        x_NH: [N, H] rows grouped by expert, float32 or bfloat16.
        probs_N: [N] router probabilities, any float dtype.
        counts: E row counts that sum to N.
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype.
        choose: a selection, or a mask whose rows all keep the same number, not 0.
        activation: silu, sigmoid, gelu (by erf) or relu.
        linears: of the dense products, which are then never gathered; torch.mm by default.

    Returns:
        y_NH: [N, H] outputs, the router's probability applied.
        mask: the neurons computed.
        gate_K: [N * S] sigma(a) of the kept entries in the mask's order, with gradient.

    Raises:
        RuntimeError: triton is missing or has no device (see `available`).
        ValueError: groups wider than the selection kernel takes.
    """
    counts, neurons = [int(count) for count in counts], w_gate_EFH.shape[1]
    operands = (x_NH, probs_N, w_gate_EFH, w_up_EFH, w_down_EFH)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    if isinstance(choose, Selection):
        kept = choose.kept
    else:
        kept = choose.indices_K.numel() // choose.num_rows
    gathered = linears is None and not differentiable and gathering_pays(counts, kept, neurons)
    y_NH, gate_K, index_NS = _MaskedGroupedMLP.apply(
        *operands, counts, choose, activation, linears or MatmulLinears(), gathered
    )
    if isinstance(choose, NeuronMask):
        return y_NH, choose, gate_K
    return y_NH, uniform_mask(index_NS, neurons, choose.block), gate_K


def gathering_pays(counts: Sequence[int], kept: int, neurons: int) -> bool:
    """Whether gathered weight rows are fewer than the dense ones: N S < F x experts with rows."""
    return sum(counts) * kept < neurons * sum(count > 0 for count in counts)


class _Computed(NamedTuple):
    """A forward pass: the output, and the kept entries' sigma(a), a, u and neurons."""

    y_NH: Tensor
    gate_NS: Tensor
    a_NS: Tensor
    u_NS: Tensor
    index_NS: Tensor


class _MaskedGroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NH, probs_N, w_gate, w_up, w_down, counts, choose, activation, linears, gathered
    ):
        x_NH, p_N, weights = x_NH.contiguous(), probs_N.contiguous(), (w_gate, w_up, w_down)
        if gathered:
            done = _gathered(x_NH, p_N, weights, counts, choose, activation, linears)
        else:
            done = _dense(x_NH, p_N, weights, counts, choose, activation, linears)
        ctx.save_for_backward(x_NH, p_N, *weights, done.a_NS, done.u_NS, done.index_NS)
        ctx.counts, ctx.activation, ctx.linears = counts, activation, linears
        ctx.mark_non_differentiable(done.index_NS)
        ctx.set_materialize_grads(False)
        return done.y_NH, done.gate_NS.view(-1), done.index_NS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH, dgate_K, _index):
        (gated,) = kernels("gated")
        x_NH, p_N, w_gate, w_up, w_down, a_NS, u_NS, index_NS = ctx.saved_tensors
        counts, linears = ctx.counts, ctx.linears
        dy_NH = torch.zeros_like(x_NH) if dy_NH is None else dy_NH.contiguous()
        dh_NF = linears.rows_by_neurons(dy_NH, w_down, counts, gradient=True)
        da_NF, du_NF, h_NF, dp_N = gated.gate_backward(
            a_NS, u_NS, p_N, index_NS, dh_NF, dgate_K, activation=ctx.activation, scattered=True
        )
        dx_NH = None
        if ctx.needs_input_grad[0]:
            dx_NH = linears.rows_by_hidden(counts, (da_NF, w_gate), (du_NF, w_up), gradient=True)
        rows_NF, wanted = (da_NF, du_NF, h_NF), ctx.needs_input_grad[2:5]
        dw = weight_grads(linears, counts, rows_NF, x_NH, dy_NH, wanted)
        return dx_NH, dp_N.to(p_N.dtype), *dw, None, None, None, None, None


def _dense(x_NH, p_N, weights, counts, choose, activation, linears) -> _Computed:
    """Dense products around the two kernels; the [N, F] gates make room for up."""
    (gated,) = kernels("gated")
    enter(GATE_GEMM)
    wide_NF = linears.rows_by_neurons(x_NH, weights[0], counts)
    enter(SELECTION)
    index_NS, a_NS = _chosen(wide_NF, choose, activation)
    enter(UP_DOWN_GEMM)
    wide_NF = linears.rows_by_neurons(x_NH, weights[1], counts, out_NF=wide_NF)
    gate_NS, u_NS, h_NF = gated.gate_forward(
        a_NS, wide_NF, p_N, index_NS, activation=activation, scattered=True
    )
    return _Computed(
        linears.rows_by_hidden(counts, (h_NF, weights[2])), gate_NS, a_NS, u_NS, index_NS
    )


def _gathered(x_NH, p_N, weights, counts, choose, activation, linears) -> _Computed:
    """Weight rows of the kept neurons alone; the gate too when the mask is ready."""
    gated, sampled, sparse = kernels("gated", "sampled_up", "sparse_down")
    w_gate, w_up, w_down = (neuron_major(w) for w in weights)
    expert_N = expert_of_row(counts, x_NH.device)
    enter(GATE_GEMM)
    if isinstance(choose, NeuronMask):
        index_NS = uniform_rows(choose)
        assert index_NS is not None  # `gathered` asks for uniform rows
        a_NS = sampled.sampled_up(x_NH, w_gate, expert_N, index_NS)
    else:
        a_NF = linears.rows_by_neurons(x_NH, w_gate, counts)
        enter(SELECTION)
        index_NS, a_NS = _chosen(a_NF, choose, activation)
    enter(UP_DOWN_GEMM)
    u_NS = sampled.sampled_up(x_NH, w_up, expert_N, index_NS)
    gate_NS, u_NS, h_NS = gated.gate_forward(
        a_NS, u_NS, p_N, index_NS, activation=activation, scattered=False
    )
    y_NH = sparse.sparse_down(h_NS, w_down, expert_N, index_NS)
    return _Computed(y_NH, gate_NS, a_NS, u_NS, index_NS)


def _chosen(a_NF: Tensor, choose: Selection | NeuronMask, activation: str) -> tuple[Tensor, Tensor]:
    """(index_NS, a_NS) of the kept entries of dense gate pre-activations."""
    if isinstance(choose, Selection) and choose.block == 1:
        (select,) = kernels("select")
        return select.select_neurons(a_NF, choose.kept, choose.groups, activation)
    if isinstance(choose, Selection):
        blocks_NQ = choose_blocks(a_NF, choose, activation)
        index_NS = neurons_of_blocks(blocks_NQ, choose.block, a_NF.shape[1])
    else:
        index_NS = choose.indices_K.contiguous().view(a_NF.shape[0], -1)
    return index_NS, a_NF.gather(1, index_NS.long())
