"""Which neurons of a dense FFN become which expert, and a router that can tell the experts apart.

Legend: T tokens, F neurons, E experts of f = F_routed / E neurons, H hidden. Pure: tensors in,
tensors out. Sources: balanced clusters of neurons that fire together and a shared part of those
that fire most, Pei et al. 2025 (CMoE, arXiv 2502.04416); a random split, Zhu et al. 2024
(LLaMA-MoE, arXiv 2406.16554).
"""

import torch
from torch import Tensor

from megatron_mone.checkpoint.upcycling import ROUTER_SPREAD

FIRING_SHARE = 1 / 8
"""A neuron fires for a token when it is among so large a share of the strongest."""
_ROUNDS = 10
_RIDGE = 1e-2
_LARGEST = 0.25
"""Of a fitted router's logits on its text: outputs of rare tokens are hundreds of times others'."""


def random_split(neurons: int, experts: int, shared: int, seed: int) -> tuple[Tensor, Tensor]:
    """Neurons [E, f] of each expert and [shared] of the shared one, by lot.

    Args:
        neurons: F; what `shared` leaves of it divides by `experts`.
        experts: E.
        shared: neurons of the shared expert.
        seed: of the lot.
    """
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    return order[shared:].view(experts, -1).sort(dim=1).values, order[:shared].sort().values


def split_by_firing(
    strength_TF: Tensor, experts: int, shared: int, seed: int
) -> tuple[Tensor, Tensor]:
    """As `random_split`: those that fire most are shared, those that fire together stay together.

    Args:
        strength_TF: of each neuron's part in the output.
        experts: E.
        shared: neurons of the shared expert.
        seed: of the first clusters.
    """
    by_rate = _firing(strength_TF).sum(0).argsort(descending=True, stable=True)
    routed = by_rate[shared:].sort().values
    owner = balanced_clusters(_firing(strength_TF[:, routed]).t(), experts, seed)
    groups = routed[owner.argsort(stable=True)].view(experts, -1)
    return groups, by_rate[:shared].sort().values


def _firing(strength_TF: Tensor) -> Tensor:
    """1 where a neuron fires for a token, else 0."""
    firing = max(1, round(strength_TF.shape[1] * FIRING_SHARE))
    return torch.zeros_like(strength_TF).scatter_(1, strength_TF.topk(firing).indices, 1.0)


def balanced_clusters(points_PD: Tensor, clusters: int, seed: int) -> Tensor:
    """[P] the cluster of each point: k-means with equally many points in each.

    Args:
        points_PD: P, which divides by `clusters`, points.
        clusters: how many.
        seed: of the points that are the first centres, drawn as k-means++ does.
    """
    points = len(points_PD)
    centres_CD = _spread_out(points_PD, clusters, torch.Generator().manual_seed(seed))
    owner_P = torch.full((points,), -1)
    for _ in range(_ROUNDS):
        costs_PC = torch.cdist(points_PD, centres_CD)
        found = _fill(costs_PC, points // clusters)
        if torch.equal(found, owner_P):
            break
        owner_P = found
        member_CP = torch.nn.functional.one_hot(owner_P, clusters).t().to(points_PD.dtype)
        centres_CD = member_CP @ points_PD / (points // clusters)
    return owner_P


def _spread_out(points_PD: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """[C, D] points, each drawn by its squared distance from those before."""
    chosen = [int(torch.randint(len(points_PD), (1,), generator=generator))]
    nearest_P = torch.full((len(points_PD),), torch.inf)
    while len(chosen) < clusters:
        nearest_P = nearest_P.minimum((points_PD - points_PD[chosen[-1]]).square().sum(1))
        by = nearest_P if nearest_P.any() else torch.ones_like(nearest_P)
        chosen.append(int(torch.multinomial(by, 1, generator=generator)))
    return points_PD[chosen]


def _fill(costs_PC: Tensor, room: int) -> Tensor:
    """Each point to the nearest cluster with room; a cluster takes those nearest to it first."""
    costs_PC = costs_PC.clone()
    owner_P = torch.full((len(costs_PC),), -1)
    left = [room] * costs_PC.shape[1]
    while (free := (owner_P < 0).nonzero().flatten()).numel():
        wanted = costs_PC[free].argmin(1)
        for cluster in wanted.unique().tolist():
            asking = free[wanted == cluster]
            taken = asking[costs_PC[asking, cluster].argsort(stable=True)[: left[cluster]]]
            owner_P[taken] = cluster
            left[cluster] -= len(taken)
            if not left[cluster]:
                costs_PC[:, cluster] = torch.inf
    return owner_P


def fitted_router(x_TH: Tensor, size_TE: Tensor) -> Tensor:
    """[E, H] whose logits follow, by least squares, what share of the output each expert makes.

    Args:
        x_TH: inputs.
        size_TE: norm of each expert's output.
    """
    share_TE = size_TE / size_TE.sum(1, keepdim=True).clamp_min(1e-12)
    wanted_TE = share_TE - 1 / size_TE.shape[1]  # a softmax sees differences alone
    gram_HH = x_TH.t() @ x_TH
    gram_HH.diagonal().add_(_RIDGE * gram_HH.diagonal().mean())
    router_EH = torch.linalg.solve(gram_HH, x_TH.t() @ wanted_TE).t()
    logits_TE = x_TH @ router_EH.t()
    scale = ROUTER_SPREAD / logits_TE.std().clamp_min(1e-12)
    return router_EH * scale.minimum(_LARGEST / logits_TE.abs().max().clamp_min(1e-12))
