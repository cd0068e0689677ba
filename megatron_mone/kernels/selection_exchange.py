"""Exact top-S of rows whose neurons are split over expert-tensor ranks.

Two exchanges find the same mask as one rank would, ties included:
- gather: every rank sends its min(S, F_l) largest scores a row; the S largest are among them.
- bisect: the ranks agree on the S-th largest score bit by bit, by counting scores at or above it.
Neurons lie in rank order, so "ties to the lower index" means that lower ranks take theirs first.
The one that moves fewer bytes is used. May touch: torch and the process group it is given.

Shapes: N rows, F_l neurons on this rank, P ranks, S kept per row over all ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

EXCHANGES = ("gather", "bisect")
_ROUNDS = 32  # bits of a float32 score


@dataclass
class ExchangeTraffic:
    """Bytes this rank has sent for selection, by exchange, since it was made."""

    gather: int = 0
    bisect: int = 0

    @property
    def total(self) -> int:
        """Of both exchanges."""
        return self.gather + self.bisect


def predicted_bytes(rows: int, kept: int, width: int, parts: int) -> dict[str, int]:
    """Bytes one rank sends for one selection, by exchange.

    An all-gather sends a rank's part to P - 1 peers; a ring all-reduce sends 2 (P - 1) / P of it.

    Args:
        rows: N.
        kept: S.
        width: F_l.
        parts: P.
    """
    ring = 2 * (parts - 1) / parts
    return {
        "gather": rows * min(kept, width) * 4 * (parts - 1),
        "bisect": round(rows * 4 * _ROUNDS * ring) + rows * 8 * (parts - 1),
    }


def choose_exchange(rows: int, kept: int, width: int, parts: int) -> str:
    """The exchange that moves fewer bytes; gather, with its one round, on a tie."""
    cost = predicted_bytes(rows, kept, width, parts)
    return "bisect" if cost["bisect"] < cost["gather"] else "gather"


def top_neurons_over_ranks(
    score_NF: Tensor,
    kept: int,
    group: ProcessGroup,
    *,
    widest: int,
    exchange: str | None = None,
    traffic: ExchangeTraffic | None = None,
) -> Tensor:
    """This rank's columns of the mask of the `kept` largest scores of each whole row.

    Args:
        score_NF: [N, F_l] above -inf, every rank the same N; F_l may differ and may be 0.
        kept: S, at most all ranks' F_l together.
        group: the P ranks, in neuron order.
        widest: the largest F_l, or any bound on it that is the same on every rank.
        exchange: one of EXCHANGES, or None to choose by predicted bytes.
        traffic: counts the bytes sent.

    Returns:
        [N, F_l] bool.
    """
    # All 16-bit types are exact in float32; float64, for tests, only fits the gather.
    score_NF = score_NF if score_NF.dtype == torch.float64 else score_NF.float()
    if exchange is None:
        exchange = choose_exchange(score_NF.shape[0], kept, widest, group.size())
    if exchange == "gather" or score_NF.dtype == torch.float64:
        kth_N1, ties_NP = _kth_by_gather(score_NF, kept, min(kept, widest), group, traffic)
    else:
        kth_N1, ties_NP = _kth_by_bisection(score_NF, kept, group, traffic)
    return _mask_from_kth(score_NF, kth_N1, ties_NP[:, group.rank()].unsqueeze(1))


def _mask_from_kth(score_NF: Tensor, kth_N1: Tensor, quota_N1: Tensor) -> Tensor:
    """All above the S-th largest score, and the first `quota` equal to it."""
    equal_NF = score_NF == kth_N1
    return (score_NF > kth_N1) | (equal_NF & (equal_NF.cumsum(dim=1) <= quota_N1))


def _quotas(above_N: Tensor, equal_NP: Tensor, kept: int) -> Tensor:
    """[N, P] ties each rank takes: the room left, lower ranks first."""
    before_NP = equal_NP.cumsum(dim=1) - equal_NP
    room_N1 = (kept - above_N).unsqueeze(1)
    return torch.minimum((room_N1 - before_NP).clamp(min=0), equal_NP)


def _kth_by_gather(
    score_NF: Tensor,
    kept: int,
    candidates: int,
    group: ProcessGroup,
    traffic: ExchangeTraffic | None,
) -> tuple[Tensor, Tensor]:
    parts, rows = group.size(), score_NF.shape[0]
    own = min(candidates, score_NF.shape[1])
    mine_NC = score_NF.new_full((rows, candidates), -torch.inf)
    mine_NC[:, :own] = score_NF.topk(own, dim=1, sorted=False).values
    gathered = [torch.empty_like(mine_NC) for _ in range(parts)]
    torch.distributed.all_gather(gathered, mine_NC, group=group)
    if traffic is not None:
        traffic.gather += mine_NC.numel() * mine_NC.element_size() * (parts - 1)
    all_NPC = torch.stack(gathered, dim=1)
    flat = all_NPC.view(rows, parts * mine_NC.shape[1])
    kth_N1 = flat.topk(kept, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above_N = (flat > kth_N1).sum(dim=1)
    equal_NP = (all_NPC == kth_N1.unsqueeze(2)).sum(dim=2)
    return kth_N1, _quotas(above_N, equal_NP, kept)


def _kth_by_bisection(
    score_NF: Tensor, kept: int, group: ProcessGroup, traffic: ExchangeTraffic | None
) -> tuple[Tensor, Tensor]:
    """The largest key that at least `kept` scores of the row reach, one bit a round."""
    parts, rows = group.size(), score_NF.shape[0]
    key_NF = _ordered_keys(score_NF)
    kth_N1 = torch.zeros((rows, 1), dtype=torch.int64, device=score_NF.device)
    for bit in reversed(range(_ROUNDS)):
        trial_N1 = kth_N1 | (1 << bit)
        reach_N = (key_NF >= trial_N1).sum(dim=1, dtype=torch.int32)
        torch.distributed.all_reduce(reach_N, group=group)
        kth_N1 = torch.where(reach_N.unsqueeze(1) >= kept, trial_N1, kth_N1)
    equal_N = (key_NF == kth_N1).sum(dim=1, dtype=torch.int32)
    above_N = (key_NF > kth_N1).sum(dim=1, dtype=torch.int32)
    counts = torch.stack((equal_N, above_N))
    gathered = [torch.empty_like(counts) for _ in range(parts)]
    torch.distributed.all_gather(gathered, counts, group=group)
    if traffic is not None:
        ring = 2 * (parts - 1) / parts
        traffic.bisect += round(rows * 4 * _ROUNDS * ring) + counts.numel() * 4 * (parts - 1)
    equal_NP = torch.stack([g[0] for g in gathered], dim=1).long()
    total_above_N = torch.stack([g[1] for g in gathered]).sum(dim=0)
    return _scores_of_keys(kth_N1), _quotas(total_above_N, equal_NP, kept)


def _ordered_keys(score_NF: Tensor) -> Tensor:
    """float32 -> int64 in [0, 2^32), in the same order; -0 and +0 share a key."""
    bits = (score_NF + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is +0.0
    return torch.where(bits < 0, -bits - 1, bits + (1 << 31))


def _scores_of_keys(key_N1: Tensor) -> Tensor:
    """Inverse of `_ordered_keys`."""
    bits = torch.where(key_N1 < (1 << 31), -key_N1 - 1, key_N1 - (1 << 31))
    return bits.int().view(torch.float32)
