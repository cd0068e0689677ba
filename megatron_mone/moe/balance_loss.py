"""Neuron-granular load-balance loss (NG-LBL): keeps every neuron of every expert in use.

May touch: torch and process groups given as arguments. Holds no state and records no metric.
    f_j  = (F / kept rows) * #{n : j kept}            1 everywhere when uniform
    P_j  = mean over rows n of a share of |g_nj|      by loss type, see LOSS_SHARES
    L    = 1/E * sum over experts and micro-batches of sum_j f_j P_j
Every type is linear in P with coefficients that carry no gradient (for entropy, the slope of the
entropy), so a rank adds up its own rows and neurons and the ranks' sums make the whole loss.

Shapes: N routed rows, F_l neurons on this rank, B row blocks (one per local expert and
micro-batch; one per local expert for scope global_batch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.kernels.activations import sum_over_group

LOSS_SHARES = {
    "raw": "kept |g|: closest to the published text, but shrinking every gate lowers it too",
    "selected": "kept |g| / the row's sum of kept |g|: scale-free, gradient sparse as the mask",
    "normalized": "|g| / the row's sum of |g|: scale-free, gradient reaches unchosen neurons",
    "entropy": "as selected; the loss is 1 - H(P) / ln F, which is 0 when uniform",
}


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over the rows of each block; they carry no gradient.

    Attributes:
        rows_B: [B] routed rows.
        counts_BF: [B, F_l] rows that keep neuron j.
        share_BF: [B, F_l] sum over rows of the share P is the mean of.
    """

    rows_B: Tensor
    counts_BF: Tensor
    share_BF: Tensor

    def summed(self, group: ProcessGroup | None) -> BlockStatistics:
        """The same sums over every rank of `group` as well (the replicas of an expert)."""
        if group is None or group.size() == 1:
            return self
        packed = torch.cat((self.rows_B.unsqueeze(1), self.counts_BF, self.share_BF), dim=1)
        torch.distributed.all_reduce(packed, group=group)
        width = self.counts_BF.shape[1]
        return BlockStatistics(packed[:, 0], packed[:, 1 : 1 + width], packed[:, 1 + width :])

    def with_uniform_row(self, num_neurons: int) -> BlockStatistics:
        """With one more row in each block, which uses all `num_neurons` neurons (F) alike.

        Keeps the logarithm of the entropy finite for a neuron that the next rows may use.
        """
        return BlockStatistics(
            self.rows_B + 1, self.counts_BF + 1, self.share_BF + 1.0 / num_neurons
        )

    def __add__(self, other: BlockStatistics) -> BlockStatistics:
        return BlockStatistics(
            self.rows_B + other.rows_B,
            self.counts_BF + other.counts_BF,
            self.share_BF + other.share_BF,
        )


def neuron_shares(
    *, gate_NF: Tensor, mask_NF: Tensor, loss_type: str, etp_group: ProcessGroup | None = None
) -> Tensor:
    """The share of each row that P is the mean of, in float32 or wider, with gradient.

    Args:
        gate_NF: [N, F_l] gate activations.
        mask_NF: [N, F_l] bool, the kept neurons.
        loss_type: a key of LOSS_SHARES.
        etp_group: ranks that hold the other neurons of the same rows.

    Returns:
        [N, F_l]. A row whose |g| sum is 0 has share 0.
    """
    size_NF = gate_NF.abs()
    if size_NF.dtype in (torch.float16, torch.bfloat16):
        size_NF = size_NF.float()
    if loss_type != "normalized":
        size_NF = size_NF.masked_fill(~mask_NF, 0.0)
    if loss_type == "raw":
        return size_NF
    total_N1 = sum_over_group(size_NF.sum(dim=1, keepdim=True), etp_group)
    return size_NF / total_N1.masked_fill(total_N1 == 0, 1.0)


def block_statistics(
    *, share_NF: Tensor, mask_NF: Tensor, block_N: Tensor, num_blocks: int
) -> BlockStatistics:
    """Sum rows, kept counts and shares by block.

    Args:
        share_NF: [N, F_l] of `neuron_shares`.
        mask_NF: [N, F_l] bool.
        block_N: [N] int64, the block of each row.
        num_blocks: B.
    """
    with torch.no_grad():
        return BlockStatistics(
            rows_B=torch.bincount(block_N, minlength=num_blocks).to(share_NF.dtype),
            counts_BF=_sum_by_block(mask_NF.to(share_NF.dtype), block_N, num_blocks),
            share_BF=_sum_by_block(share_NF.detach(), block_N, num_blocks),
        )


def row_weights(
    statistics: BlockStatistics,
    *,
    loss_type: str,
    num_experts: int,
    num_neurons: int,
    neurons_per_token: int | None,
    rows_per_share: float = 1.0,
    etp_group: ProcessGroup | None = None,
) -> Tensor:
    """What a row's share of each neuron weighs in the loss of its block; no gradient.

    Args:
        statistics: of each whole block, summed over all its rows wherever they are.
        loss_type: a key of LOSS_SHARES.
        num_experts: E, over all ranks.
        num_neurons: F, over all ranks.
        neurons_per_token: S, or None where rows keep different numbers.
        rows_per_share: divides a block's rows: the micro-batches summed into `statistics`.
        etp_group: ranks that hold the other neurons, needed when neurons_per_token is None.

    Returns:
        [B, F_l]. A block without rows has weights that no row uses.
    """
    rows_B1 = statistics.rows_B.clamp(min=1).unsqueeze(1)
    if loss_type == "entropy":
        mean_BF = (statistics.share_BF / rows_B1).clamp(min=torch.finfo(torch.float32).tiny)
        slope_BF = 1.0 + mean_BF.log() / math.log(max(num_neurons, 2))
    elif neurons_per_token is not None:
        slope_BF = statistics.counts_BF * (num_neurons / neurons_per_token) / rows_B1
    else:
        kept_B1 = sum_over_group(statistics.counts_BF.sum(dim=1, keepdim=True), etp_group)
        slope_BF = statistics.counts_BF * num_neurons / kept_B1.clamp(min=1)
    return slope_BF * (rows_per_share / num_experts) / rows_B1


def neuron_balance_loss(*, share_NF: Tensor, block_N: Tensor, weight_BF: Tensor) -> Tensor:
    """This rank's part of the balance loss, unscaled (alpha = 1).

    The parts of all ranks that hold rows or neurons of the same experts sum to
    sum over micro-batches of (1 / E) * sum over experts of sum_j f_j P_j, which is the number of
    micro-batches when every neuron is used alike (types selected and normalized).

    Args:
        share_NF: [N, F_l] of `neuron_shares`, with gradient.
        block_N: [N] int64, the block of each row.
        weight_BF: [B, F_l] of `row_weights`.

    Returns:
        Scalar. A block without rows contributes 0.
    """
    return (share_NF * weight_BF.index_select(0, block_N)).sum()


def _sum_by_block(x_NF: Tensor, block_N: Tensor, num_blocks: int) -> Tensor:
    total_BF = x_NF.new_zeros((num_blocks, x_NF.shape[1]))
    return total_BF.index_add_(0, block_N, x_NF)
