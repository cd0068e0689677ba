"""Gate activations -> the neurons kept: exact top-S or threshold, by group, over ETP ranks.

May touch: torch and one process group, given as an argument. Nothing here is differentiated.
Shapes: N routed rows, F neurons of an expert, F_l of them on this rank (F / ETP), G groups.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.kernels.selection_exchange import ExchangeTraffic, top_neurons_over_ranks


@dataclass(frozen=True)
class NeuronSelector:
    """The selection rule of one model, the same on every layout (docs/MODEL.md, "Forward").

    Attributes:
        rule: "topk" or "threshold".
        min_neurons, max_neurons: S_min and S_max kept per row over all F neurons; both S for topk.
        threshold: fraction of the group's largest score, threshold rule only.
        groups: G equal contiguous groups of the F neurons, each with 1/G of the bounds.
        block: B adjacent neurons chosen together by the sum of their scores (`block_scores`); B
            divides the groups' neurons, bounds and slices, so that no rank holds a part of one.
        etp_group: ranks that hold the F neurons in F_l slices, in rank order; None when whole.
        traffic: counts the bytes sent to choose; none when G is a multiple of the ranks.
    """

    rule: str
    min_neurons: int
    max_neurons: int
    threshold: float = 0.0
    groups: int = 1
    block: int = 1
    etp_group: ProcessGroup | None = None
    traffic: ExchangeTraffic = field(default_factory=ExchangeTraffic)

    @torch.no_grad()
    def __call__(self, gate_NF: Tensor, bias_NF: Tensor | None = None) -> Tensor:
        """Choose neurons by |gate| (+ bias, for choosing only).

        Args:
            gate_NF: [N, F_l] gate activations of this rank's neurons.
            bias_NF: [N, F_l] added to |gate|, or None.

        Returns:
            mask_NF: [N, F_l] bool. A NaN gate ranks above every number, so that it is kept and
            surfaces in the output. Ties go to the lower neuron index.
        """
        score_NF = gate_NF.abs()
        if bias_NF is not None:
            score_NF = score_NF + bias_NF
        score_NB = block_scores(score_NF, self.block)
        score_NB = torch.where(score_NB.isnan(), torch.inf, score_NB)
        parts = 1 if self.etp_group is None else self.etp_group.size()
        if parts == 1 or self.groups % parts == 0:
            mask_NB = self._select(score_NB, self.groups // parts)
        else:
            mask_NB = self._select_over_ranks(score_NB)
        return mask_NB if self.block == 1 else mask_NB.repeat_interleave(self.block, dim=1)

    def local_selection(self) -> tuple[int, int, int] | None:
        """(kept, groups, block) of this rank's neurons where the rule is top-S within them, else
        None."""
        parts = 1 if self.etp_group is None else self.etp_group.size()
        if self.rule != "topk" or (parts > 1 and self.groups % parts):
            return None
        return self.max_neurons // parts, self.groups // parts, self.block

    @property
    def _bounds(self) -> tuple[int, int]:
        """Fewest and most blocks of one group."""
        size = self.groups * self.block
        return self.min_neurons // size, self.max_neurons // size

    def _select_over_ranks(self, score_NF: Tensor) -> Tensor:
        """Groups that straddle ranks, one after another; each rank holds a slice of each."""
        assert self.etp_group is not None
        width, parts = score_NF.shape[1], self.etp_group.size()
        size, start = width * parts // self.groups, self.etp_group.rank() * width
        masks = []
        for group in range(self.groups):
            first = min(max(group * size - start, 0), width)
            last = min(max((group + 1) * size - start, 0), width)
            masks.append(self._select_slice(score_NF[:, first:last], min(size, width)))
        return torch.cat(masks, dim=1)

    def _select_slice(self, score_NF: Tensor, widest: int) -> Tensor:
        """This rank's slice of the mask of one group."""
        assert self.etp_group is not None
        top = partial(
            top_neurons_over_ranks, score_NF, group=self.etp_group, widest=widest,
            traffic=self.traffic,
        )  # fmt: skip
        low, high = self._bounds
        mask_NF = top(high)
        if self.rule == "threshold":
            padded = torch.nn.functional.pad(score_NF, (0, 1), value=-torch.inf)
            floor_N1 = padded.amax(dim=1, keepdim=True)
            torch.distributed.all_reduce(
                floor_N1, op=torch.distributed.ReduceOp.MAX, group=self.etp_group
            )
            mask_NF &= score_NF >= floor_N1 * self.threshold
            mask_NF |= top(low)
        return mask_NF

    def _select(self, score_NF: Tensor, groups: int) -> Tensor:
        rows, width = score_NF.shape
        score_RF = score_NF.reshape(rows * groups, width // groups)
        low, high = self._bounds
        mask_RF = top_neurons(score_RF, high)
        if self.rule == "threshold":
            floor_R1 = score_RF.amax(dim=1, keepdim=True) * self.threshold
            mask_RF &= score_RF >= floor_R1
            mask_RF |= top_neurons(score_RF, low)
        return mask_RF.view(rows, width)


def block_scores(score_NF: Tensor, block: int) -> Tensor:
    """[N, F / block] sums of adjacent scores, in float32 (or float64), in an order that is part of
    the definition, so that every backend and layout finds the same sums to the bit:
    zeros fill a block up to P values, the next power of two; then, for half = P/2, P/4, ... 1,
    value i becomes value i + value (half + i) for i < half, and value 0 of the last is the sum.
    Adding a zero changes no score: the first step may copy values that have no partner instead.

    Args:
        score_NF: [N, F].
        block: B, divides F; 1 returns the scores as they are.
    """
    if block == 1:
        return score_NF
    if score_NF.dtype != torch.float64:
        score_NF = score_NF.float()
    parts_NBW = score_NF.unflatten(1, (-1, block))
    padding = (1 << (block - 1).bit_length()) - block
    if padding:
        parts_NBW = torch.nn.functional.pad(parts_NBW, (0, padding))
    while parts_NBW.shape[2] > 1:
        low_NBW, high_NBW = parts_NBW.chunk(2, dim=2)
        parts_NBW = low_NBW + high_NBW
    return parts_NBW.squeeze(2)


def top_neurons(score_RF: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` largest scores of each row; ties go to the lower index, exactly `kept`.

    Args:
        score_RF: [R, F] without NaN.
        kept: 1 to F.

    Returns:
        [R, F] bool.
    """
    if kept == score_RF.shape[1]:
        return torch.ones_like(score_RF, dtype=torch.bool)
    if score_RF.shape[0] == 0:
        return torch.zeros_like(score_RF, dtype=torch.bool)
    kth_R1 = score_RF.topk(kept, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above_RF = score_RF > kth_R1
    equal_RF = score_RF == kth_R1
    room_R1 = kept - above_RF.sum(dim=1, keepdim=True)
    if bool((equal_RF.sum(dim=1, keepdim=True) > room_R1).any()):
        equal_RF &= equal_RF.cumsum(dim=1) <= room_R1
    return above_RF | equal_RF
