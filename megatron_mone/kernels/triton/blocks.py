"""The masked grouped expert MLP over kept blocks of adjacent neurons, on block-sparse GEMMs.

Kept blocks of 16 neurons or more give tensor cores whole tiles, so every product but the choice of
blocks is sparse, forward and backward. The blocks are given: `choose_blocks` makes them, from a
dense gate product that the caller pays for. Gathered rows and per-block partial sums cost bytes: in
a model of an H100 (triton_limits.py) the forward pass loses to dense GEMMs at every B up to 128,
and the backward pass wins only at B = 128 with some thousands of rows per expert.
Not run on a GPU yet. Shapes: N rows, E experts, F neurons, H hidden, Q blocks of B neurons per row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype
from megatron_mone.kernels.neuron_selection import block_scores
from megatron_mone.kernels.triton.arguments import expert_of_row, uniform_mask
from megatron_mone.kernels.triton.availability import kernels
from megatron_mone.kernels.triton.block_index import block_index

BLOCK_SIZES = (16, 32, 64, 128)


def block_grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    counts: Sequence[int],
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    blocks_NQ: Tensor,
    block: int,
    activation: str,
) -> tuple[Tensor, NeuronMask, Tensor]:
    """Run the routed rows through the given blocks of their experts.

    Args:
        x_NH: [N, H] rows grouped by expert, float32 or bfloat16.
        probs_N: [N] router probabilities, any float dtype.
        counts: E row counts that sum to N.
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype.
        blocks_NQ: [N, Q] integers, the kept blocks of each row, ascending; 0 to F / block - 1
            (neither is checked: that would copy to the host).
        block: B neurons of a block, one of BLOCK_SIZES; divides F.
        activation: silu, sigmoid, gelu (by erf) or relu.

    Returns:
        y_NH [N, H]; the mask over neurons; gate_K [N * Q * B] sigma(a) of the kept entries.

    Raises:
        RuntimeError: triton is missing or has no device (see `available`).
    """
    counts, neurons = [int(count) for count in counts], w_gate_EFH.shape[1]
    y_NH, gate_K = _BlockGroupedMLP.apply(
        x_NH, probs_N, w_gate_EFH, w_up_EFH, w_down_EFH, counts, blocks_NQ, block, activation
    )
    index_NS = neurons_of_blocks(blocks_NQ, block, neurons)
    return y_NH, uniform_mask(index_NS, neurons, block), gate_K


def choose_blocks(a_NF: Tensor, selection: Selection, activation: str) -> Tensor:
    """[N, S / B] blocks with the largest sums of |g|, ascending: the reference's choice.

    Args:
        a_NF: [N, F] gate pre-activations, contiguous.
        selection: S, groups and B > 1.
        activation: of g = sigma(a), which is rounded to a's dtype before it is summed.
    """
    (select,) = kernels("select")
    score_NB = block_scores(gate_activation(activation, a_NF).abs(), selection.block)
    kept = selection.kept // selection.block
    return select.select_neurons(score_NB.contiguous(), kept, selection.groups)[0]


def neurons_of_blocks(blocks_NQ: Tensor, block: int, neurons: int) -> Tensor:
    """[N, Q B] neurons of the blocks, in the index type of masks over F neurons."""
    within_B = torch.arange(block, device=blocks_NQ.device)
    index_NQB = blocks_NQ.long()[:, :, None] * block + within_B
    return index_NQB.flatten(1).to(index_dtype(neurons))


class _BlockGroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NH, probs_N, w_gate, w_up, w_down, counts, blocks_NQ, block, activation
    ):
        gated, sampled, expand = kernels("gated", "block_sampled", "block_expand")
        # Gate and up may be slices of one parameter, which these kernels do not address: a copy.
        x_NH, weights = x_NH.contiguous(), [w.contiguous() for w in (w_gate, w_up, w_down)]
        index = block_index(
            blocks_NQ, expert_of_row(counts, x_NH.device), len(counts), w_gate.shape[1], block
        )  # fmt: skip
        a_NS = sampled.block_sampled(x_NH, weights[0], index)
        u_NS = sampled.block_sampled(x_NH, weights[1], index)
        p_N = probs_N.contiguous()
        gate_NS, u_NS, h_NS = gated.gate_forward(
            a_NS, u_NS, p_N, a_NS, activation=activation, scattered=False
        )
        y_NH = expand.block_expand(h_NS, weights[2], index)
        ctx.save_for_backward(x_NH, p_N, w_gate, w_up, w_down, a_NS, u_NS)  # not the copies
        ctx.index, ctx.activation = index, activation
        ctx.set_materialize_grads(False)
        return y_NH, gate_NS.view(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH, dgate_K):
        gated, sampled, expand, weight_grad = kernels(
            "gated", "block_sampled", "block_expand", "block_weight_grad"
        )
        x_NH, p_N, *weights, a_NS, u_NS = ctx.saved_tensors
        w_gate, w_up, w_down = (w.contiguous() for w in weights)
        dy_NH = torch.zeros_like(x_NH) if dy_NH is None else dy_NH.contiguous()
        dh_NS = sampled.block_sampled(dy_NH, w_down, ctx.index)
        da_NS, du_NS, h_NS, dp_N = gated.gate_backward(
            a_NS, u_NS, p_N, a_NS, dh_NS, dgate_K, activation=ctx.activation, scattered=False
        )
        dx_NH = None
        if ctx.needs_input_grad[0]:
            dx_NH = expand.block_expand(da_NS, w_gate, ctx.index, (du_NS, w_up))
        products = ((da_NS, x_NH), (du_NS, x_NH), (h_NS, dy_NH))
        dw = [
            weight_grad.block_weight_grad(*product, ctx.index, w_gate.shape[1]) if wanted else None
            for product, wanted in zip(products, ctx.needs_input_grad[2:5], strict=True)
        ]
        return dx_NH, dp_N.to(p_N.dtype), *dw, None, None, None, None
