"""Neuron-granular load-balance loss (NG-LBL): keeps every neuron of every expert in use.

May touch: torch and process groups given as arguments. Holds no state and records no metric.
    f_j  = (F / kept rows) * #{n : j kept}            1 everywhere when uniform
    P_j  = mean over rows n of a share of |g_nj|      by loss type, see LOSS_SHARES
    L    = 1/E * sum over experts and micro-batches of sum_j f_j P_j
Every type is linear in P with coefficients that carry no gradient (for entropy, the slope of the
entropy), so a rank adds up its own rows and neurons and the ranks' sums make the whole loss: the
sum over micro-batches of (1 / E) * sum over experts of sum_j f_j P_j, which is the number of
micro-batches when every neuron is used alike (types selected and normalized).

Shapes: N routed rows, F_l neurons on this rank, K kept entries, B blocks (one per local expert and
micro-batch; one per local expert for scope global_batch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.kernels import GroupedMLPOutput
from megatron_mone.kernels.activations import sum_over_group
from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype
from megatron_mone.moe.gate_shares import GateShares

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
        packed = self.columns()
        torch.distributed.all_reduce(packed, group=group)
        return BlockStatistics.of_columns(packed)

    @classmethod
    def of_columns(cls, packed: Tensor) -> BlockStatistics:
        """From [B, 1 + 2 F_l]: rows, counts, shares."""
        width = (packed.shape[1] - 1) // 2
        return cls(packed[:, 0], packed[:, 1 : 1 + width], packed[:, 1 + width :])

    def columns(self) -> Tensor:
        """[B, 1 + 2 F_l]: rows, counts, shares."""
        return torch.cat((self.rows_B.unsqueeze(1), self.counts_BF, self.share_BF), dim=1)

    def with_uniform_row(self, num_neurons: int) -> BlockStatistics:
        """With one more row in each block, which uses all `num_neurons` neurons (F) alike.

        Keeps the logarithm of the entropy finite for a neuron that the next rows may use.
        """
        return BlockStatistics(
            self.rows_B + 1, self.counts_BF + 1, self.share_BF + 1.0 / num_neurons
        )


def gate_shares(
    output: GroupedMLPOutput,
    block_N: Tensor,
    num_blocks: int,
    *,
    loss_type: str,
    has_outside: bool = False,
    activation: str = "silu",
    etp_group: ProcessGroup | None = None,
) -> GateShares:
    """The gates that P of a loss type is made of: of the kept entries; for `normalized`, of all.

    Args:
        output: of the experts; its `gate_NF` is needed by `normalized` only.
        block_N: [N] int64, the block of each row; B for a row of none.
        num_blocks: B.
        loss_type: a key of LOSS_SHARES.
        has_outside: whether there may be rows of no block.
        activation: the experts' gate activation.
        etp_group: ranks that hold the other neurons of the same rows.
    """
    mask, gate_K, a_K = output.mask, output.gate_K, output.a_K
    if loss_type == "normalized":
        assert output.gate_NF is not None
        rows, neurons = output.gate_NF.shape
        mask = NeuronMask.unchecked(
            torch.arange(neurons, dtype=index_dtype(neurons), device=block_N.device).repeat(rows),
            torch.arange(rows + 1, device=block_N.device) * neurons,
            neurons,
            kept=neurons,
        )
        gate_K, a_K = output.gate_NF.flatten(), None
    assert gate_K is not None
    return GateShares(
        mask, gate_K, block_N, num_blocks, loss_type != "raw", a_K, activation, etp_group,
        has_outside, output.sums_by,
    )  # fmt: skip


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
