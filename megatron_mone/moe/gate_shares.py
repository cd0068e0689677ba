"""The part of the balance loss that touches every kept entry: sums of shares, and their gradient.

A row's share of neuron j is |g_nj| / T_n, T_n the row's sum of |g| (or 1 where the loss is not
scale-free). The loss is linear in the shares with weights w that carry no gradient, so that
    L         = sum over blocks b and neurons j of w_bj * (sum over the block's rows of the share)
    dL/dg_nj  = sign(g_nj) (w_bj - L_n) / T_n,    L_n = sum over j of w_bj |g_nj| / T_n
and backward needs the gates, T_n and w alone: nothing per entry is kept beyond what the experts
keep anyway (their pre-activations, from which the gates are made again).

May touch: torch, one process group. Shapes: N routed rows, F_l neurons of this rank, K entries,
B blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_mone.kernels.activations import gate_activation
from megatron_mone.moe.neuron_mask import NeuronMask


@dataclass(frozen=True)
class GateShares:
    """The gates of some entries and the blocks of their rows.

    Attributes:
        mask: the entries.
        gate_K: [K] their gate activations, with gradient.
        block_N: [N] int64, block of each row.
        num_blocks: B.
        scale_free: whether a row's shares are divided by their sum.
        a_K: [K] pre-activations that something else keeps for backward, or None.
        activation: sigma, elementwise; only used with a_K.
        etp_group: ranks that hold the other neurons of the same rows.
    """

    mask: NeuronMask
    gate_K: Tensor
    block_N: Tensor
    num_blocks: int
    scale_free: bool = True
    a_K: Tensor | None = None
    activation: str = "silu"
    etp_group: ProcessGroup | None = None

    @torch.no_grad()
    def sums(self) -> tuple[Tensor, Tensor | None]:
        """share_BF [B, F_l], the shares summed over each block's rows, and T_N [N] (None: all 1).

        In float32 or wider; a row whose |g| are all 0 has shares of 0.
        """
        size_K, row_K = _sizes(self.gate_K), self.mask.rows_K
        total_N = None
        if self.scale_free:
            total_N = size_K.new_zeros(self.mask.num_rows).index_add_(0, row_K, size_K)
            if self.etp_group is not None and self.etp_group.size() > 1:
                torch.distributed.all_reduce(total_N, group=self.etp_group)
            size_K = size_K / _divisor(total_N)[row_K]
        share_BF = size_K.new_zeros(self.num_blocks * self.mask.num_neurons)
        share_BF.index_add_(0, _cells(self.mask, self.block_N, row_K), size_K)
        return share_BF.view(self.num_blocks, self.mask.num_neurons), total_N

    def loss(self, weight_BF: Tensor, share_BF: Tensor, total_N: Tensor | None) -> Tensor:
        """Scalar sum of weight times share, with its gradient.

        Args:
            weight_BF: [B, F_l] without gradient.
            share_BF, total_N: of `sums`.
        """
        return _Loss.apply(self.gate_K, self, weight_BF, share_BF, total_N)


def kept_counts(mask: NeuronMask, block_N: Tensor, num_blocks: int) -> Tensor:
    """[B, F_l] int64 rows of each block that keep each neuron."""
    cells = _cells(mask, block_N, mask.rows_K)
    return torch.bincount(cells, minlength=num_blocks * mask.num_neurons).view(num_blocks, -1)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_K, shares: GateShares, weight_BF, share_BF, total_N):
        kept = gate_K if shares.a_K is None else shares.a_K
        mask = shares.mask
        ctx.save_for_backward(
            kept, mask.indices_K, mask.offsets_N1, shares.block_N, weight_BF, total_N
        )
        ctx.num_neurons, ctx.etp_group = mask.num_neurons, shares.etp_group
        ctx.activation = None if shares.a_K is None else shares.activation
        return (weight_BF * share_BF).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss):
        gate_K, indices_K, offsets_N1, block_N, weight_BF, total_N = ctx.saved_tensors
        if ctx.activation is not None:
            gate_K = gate_activation(ctx.activation, gate_K)
        mask = NeuronMask.unchecked(indices_K, offsets_N1, ctx.num_neurons)
        row_K, size_K = mask.rows_K, _sizes(gate_K)
        slope_K = weight_BF.flatten()[_cells(mask, block_N, row_K)] * dloss
        if total_N is not None:
            divisor_N = _divisor(total_N)
            loss_N = torch.zeros_like(total_N).index_add_(0, row_K, slope_K * size_K)
            if ctx.etp_group is not None and ctx.etp_group.size() > 1:
                torch.distributed.all_reduce(loss_N, group=ctx.etp_group)
            slope_K = (slope_K - (loss_N / divisor_N)[row_K]) / divisor_N[row_K]
        return (slope_K * gate_K.sign()).to(gate_K.dtype), None, None, None, None


def _sizes(gate_K: Tensor) -> Tensor:
    """|g| in float32 or wider."""
    half = gate_K.dtype in (torch.float16, torch.bfloat16)
    return gate_K.detach().abs().float() if half else gate_K.detach().abs()


def _divisor(total_N: Tensor) -> Tensor:
    return total_N.masked_fill(total_N == 0, 1.0)


def _cells(mask: NeuronMask, block_N: Tensor, row_K: Tensor) -> Tensor:
    """[K] int64 index of each entry's (block, neuron) in a flat [B, F_l]."""
    return (block_N * mask.num_neurons)[row_K] + mask.indices_K
