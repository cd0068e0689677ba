"""The part of the balance loss that touches every kept entry: sums of shares, and their gradient.

A row's share of neuron j is |g_nj| / T_n, T_n the row's sum of |g| (or 1 where the loss is not
scale-free). The loss is linear in the shares with weights w that carry no gradient, so that
    L         = sum over blocks b and neurons j of w_bj * (sum over the block's rows of the share)
    dL/dg_nj  = sign(g_nj) (w_bj - L_n) / T_n,    L_n = sum over j of w_bj |g_nj| / T_n
and backward needs the gates, T_n and w alone: nothing per entry is kept beyond what the experts
keep anyway (their pre-activations, from which the gates are made again).

May touch: torch, the CPU kernels, one process group. Shapes: N routed rows, F_l neurons of this
rank, K entries, B blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_mone.kernels import GroupedMLPOutput
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.cpu import shares as native
from megatron_mone.kernels.neuron_mask import NeuronMask


@dataclass(frozen=True)
class GateShares:
    """The gates of some entries and the blocks of their rows.

    Attributes:
        mask: the entries.
        gate_K: [K] their gate activations, with gradient.
        block_N: [N] int64, block of each row; B for a row of none.
        num_blocks: B.
        scale_free: whether a row's shares are divided by their sum.
        a_K: [K] pre-activations that something else keeps for backward, or None.
        activation: sigma, elementwise; only used with a_K.
        etp_group: ranks that hold the other neurons of the same rows.
        has_outside: whether there may be rows of no block.
        sums_by: see GroupedMLPOutput.
    """

    mask: NeuronMask
    gate_K: Tensor
    block_N: Tensor
    num_blocks: int
    scale_free: bool = True
    a_K: Tensor | None = None
    activation: str = "silu"
    etp_group: ProcessGroup | None = None
    has_outside: bool = False
    sums_by: type | None = None

    @torch.no_grad()
    def sums(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums over the rows of each block.

        Returns:
            share_BF: [B, F_l] shares in float32 or wider; a row whose |g| are all 0 has shares 0.
            counts_BF: [B, F_l] int64 entries.
            total_N: [N] T_n; None where all are 1.
        """
        entries = gate_sums(self.mask, self.gate_K, self.block_N, self.sums_by)
        total_N = _over_ranks(entries.row_sums(), self.etp_group) if self.scale_free else None
        share_BF, counts_BF = entries.share_sums(self.num_blocks + self.has_outside, total_N)
        return share_BF[: self.num_blocks], counts_BF[: self.num_blocks], total_N

    def loss(self, weight_BF: Tensor, share_BF: Tensor, total_N: Tensor | None) -> Tensor:
        """Scalar sum of weight times share, with its gradient.

        Args:
            weight_BF: [B, F_l] without gradient.
            share_BF, total_N: of `sums`.
        """
        return _Loss.apply(self.gate_K, self, weight_BF, share_BF, total_N)


def kept_counts(
    output: GroupedMLPOutput, block_N: Tensor, num_blocks: int, has_outside: bool = False
) -> Tensor:
    """[B, F_l] int64 rows of each block that keep each neuron; arguments as of GateShares."""
    assert output.gate_K is not None
    entries = gate_sums(output.mask, output.gate_K, block_N, output.sums_by)
    return entries.share_sums(num_blocks + has_outside, None)[1][:num_blocks]


def gate_sums(
    mask: NeuronMask, gate_K: Tensor, block_N: Tensor, sums_by: type | None = None
) -> TorchGateSums | native.GateSums:
    """The sums over one mask's gates, native where they can be, if nothing is named."""
    usual = native.GateSums if native.usable(gate_K) else TorchGateSums
    return (sums_by or usual)(mask, gate_K, block_N)


class TorchGateSums:
    """`kernels.cpu.shares.GateSums` on any device and in any dtype."""

    def __init__(self, mask: NeuronMask, gate_K: Tensor, block_N: Tensor) -> None:
        self.mask, self.gate_K, self.row_K = mask, gate_K.detach(), mask.rows_K
        half = gate_K.dtype in (torch.float16, torch.bfloat16)
        self.size_K = self.gate_K.abs().float() if half else self.gate_K.abs()
        self.cell_K = (block_N * mask.num_neurons)[self.row_K] + mask.indices_K

    def row_sums(self, weight_BF: Tensor | None = None) -> Tensor:
        """[N] sums of |g|, each times its weight where there are weights."""
        size_K = self.size_K
        if weight_BF is not None:
            size_K = size_K * weight_BF.flatten()[self.cell_K]
        return size_K.new_zeros(self.mask.num_rows).index_add_(0, self.row_K, size_K)

    def share_sums(self, blocks: int, total_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, F_l] sums of |g| / total, and int64 counts."""
        size_K, cells = self.size_K, blocks * self.mask.num_neurons
        if total_N is not None:
            size_K = size_K / _divisor(total_N)[self.row_K]
        share_BF = size_K.new_zeros(cells).index_add_(0, self.cell_K, size_K)
        counts_BF = self.cell_K.new_zeros(cells).index_add_(
            0, self.cell_K, torch.ones_like(self.cell_K)
        )  # bincount would wait for the device
        return share_BF.view(blocks, -1), counts_BF.view(blocks, -1)

    def slopes(self, weight_BF: Tensor, total_N: Tensor | None, loss_N: Tensor | None) -> Tensor:
        """[K] sign(g) (weight - loss_n) / total_n."""
        slope_K = weight_BF.flatten()[self.cell_K]
        if loss_N is not None:
            slope_K = slope_K - loss_N[self.row_K]
        if total_N is not None:
            slope_K = slope_K / _divisor(total_N)[self.row_K]
        return slope_K * self.gate_K.sign()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_K, shares: GateShares, weight_BF, share_BF, total_N):
        kept = gate_K if shares.a_K is None else shares.a_K
        mask = shares.mask
        weights = weight_BF
        if shares.has_outside:  # which weigh nothing
            weights = torch.nn.functional.pad(weight_BF, (0, 0, 0, 1))
        ctx.save_for_backward(
            kept, mask.indices_K, mask.offsets_N1, shares.block_N, weights, total_N
        )
        ctx.num_neurons, ctx.etp_group = mask.num_neurons, shares.etp_group
        ctx.sums_by = shares.sums_by
        ctx.activation = None if shares.a_K is None else shares.activation
        return (weight_BF * share_BF).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss):
        gate_K, indices_K, offsets_N1, block_N, weight_BF, total_N = ctx.saved_tensors
        if ctx.activation is not None:
            gate_K = gate_activation(ctx.activation, gate_K)
        mask = NeuronMask.unchecked(indices_K, offsets_N1, ctx.num_neurons)
        entries = gate_sums(mask, gate_K, block_N, ctx.sums_by)
        loss_N = None
        if total_N is not None:
            loss_N = _over_ranks(entries.row_sums(weight_BF), ctx.etp_group) / _divisor(total_N)
        slope_K = entries.slopes(weight_BF, total_N, loss_N) * dloss
        return slope_K.to(gate_K.dtype), None, None, None, None


def _over_ranks(sum_N: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(sum_N, group=group)
    return sum_N


def _divisor(total_N: Tensor) -> Tensor:
    return total_N.masked_fill(total_N == 0, 1.0)
