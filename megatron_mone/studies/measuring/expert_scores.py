"""Which experts of a layer to remove: formulas of what was recorded. Pure.

Shapes: T tokens, E experts, H hidden size, K experts of a token. `output_TEH` is what each expert
gives for each token, without the router's weight; `weight_TE` is that weight, 0 of experts that
were not chosen. A score is higher for an expert that matters more.
"""

import itertools
from collections.abc import Collection

import torch
from torch import Tensor


def routed(logits_TE: Tensor, topk: int, removed: Collection[int] = ()) -> Tensor:
    """Weights of the K largest logits of the experts that are left, softmax over them.

    Args:
        logits_TE: of the router.
        topk: K.
        removed: experts whose logit is minus infinity, as Lu et al. remove them (arXiv 2402.14800).
    """
    left_TE = logits_TE.clone()
    left_TE[:, list(removed)] = -torch.inf
    value_TK, at_TK = left_TE.topk(topk, dim=1)
    return torch.zeros_like(logits_TE).scatter(1, at_TK, value_TK.softmax(dim=1))


def frequency(weight_TE: Tensor) -> Tensor:
    """[E] share of tokens that chose an expert."""
    return (weight_TE > 0).float().mean(0)


def mean_probability(logits_TE: Tensor) -> Tensor:
    """[E] mean over all tokens of the router's softmax over all experts."""
    return logits_TE.softmax(dim=1).mean(0)


def output_norm(weight_TE: Tensor, output_TEH: Tensor) -> Tensor:
    """[E] mean |f(x)| over tokens that chose an expert; MAN of arXiv 2606.15716, from its
    description; formula not read."""
    return _over_its_tokens(output_TEH.norm(dim=2), weight_TE > 0)


def reap(weight_TE: Tensor, output_TEH: Tensor) -> Tensor:
    """[E] mean of the router's weight times |f(x)| over tokens that chose an expert: REAP,
    router-weighted expert activation pruning (arXiv 2510.13999), whose S_j this is."""
    return _over_its_tokens(weight_TE * output_TEH.norm(dim=2), weight_TE > 0)


def _over_its_tokens(value_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    return (value_TE * chosen_TE).sum(0) / chosen_TE.sum(0).clamp(min=1)


def lowest(score_E: Tensor, count: int) -> tuple[int, ...]:
    """The `count` experts, or neurons, of the lowest scores, ascending; ties to the lower index."""
    return tuple(sorted(score_E.argsort(stable=True)[:count].tolist()))


def by_reconstruction(
    logits_TE: Tensor, output_TEH: Tensor, topk: int, count: int
) -> tuple[int, ...]:
    """The `count` experts without which the layer's output differs least, of all such sets.

    Lu et al. (arXiv 2402.14800): |y - y'|, the rest routed anew, each layer on the whole model's
    inputs. Their code adds up the norms of batches; here one norm is of all tokens. Every set is
    tried: E over count.
    """
    whole_TH = _layer(routed(logits_TE, topk), output_TEH)

    def error(removed: tuple[int, ...]) -> float:
        return float((_layer(routed(logits_TE, topk, removed), output_TEH) - whole_TH).norm())

    return min(itertools.combinations(range(logits_TE.shape[1]), count), key=error)


def _layer(weight_TE: Tensor, output_TEH: Tensor) -> Tensor:
    return torch.einsum("te,teh->th", weight_TE, output_TEH)


def by_similarity(router_EH: Tensor, weight_EX: Tensor, count: int) -> tuple[int, ...]:
    """The `count` experts that others stand for: the structured part of STUN (arXiv 2409.06211).

    Experts whose rows of the router are near are one cluster, merged until E - count are left; of
    each cluster the expert stays whose weights are nearest to the cluster's mean. Clusters are
    merged by their farthest members. STUN's likeness of two experts is -l1 |W_i - W_j| + l2 a_ij,
    a_ij from how often both are chosen; here l1 = 1 and l2 = 0. Not done of STUN: one threshold of
    distance for all layers, which takes more experts of one than of another; the mean of a cluster
    in place of a member where few experts are left; and its second part, which removes single
    weights. Its code was read, and a summary of its formula.

    Args:
        router_EH: the router's weights.
        weight_EX: of the experts.
        count: experts to remove, 0 to E - 1.
    """
    far_EE = torch.cdist(router_EH.float(), router_EH.float())
    clusters = [[one] for one in range(len(router_EH))]
    for _ in range(count):
        one, other = min(
            itertools.combinations(range(len(clusters)), 2),
            key=lambda pair: float(far_EE[clusters[pair[0]]][:, clusters[pair[1]]].max()),
        )
        clusters[one] += clusters.pop(other)
    removed: list[int] = []
    for members in clusters:
        weights = weight_EX[members].float()
        stays = members[int((weights - weights.mean(0)).norm(dim=1).argmin())]
        removed += [one for one in members if one != stays]
    return tuple(sorted(removed))


def skipped_by_score(weight_TE: Tensor, share: float) -> Tensor:
    """Weights without those below `share` of the token's largest, the rest summing to 1 again: the
    dynamic skipping of Lu et al. (arXiv 2402.14800), for any K. There K is 2, and each layer's
    share is its median ratio of the second weight to the first; here one is given for all."""
    return _without(weight_TE, weight_TE < share * weight_TE.amax(1, keepdim=True))


def skipped_by_use(weight_TE: Tensor, share: float, window: int) -> Tensor:
    """Weights without experts that a sequence chose less often than `share` of an even part, K
    `window` / E times: PESF of EAC-MoE (arXiv 2508.01625, equation 6; `share` is its alpha). It
    says nothing of the weights that stay: here the rest sums to 1 again, and a token that would
    lose all its experts keeps them.

    Args:
        weight_TE: tokens of whole sequences, one after another.
        share: of an even part.
        window: tokens of a sequence.
    """
    chosen_TE = weight_TE > 0
    count_RE = chosen_TE.view(-1, window, chosen_TE.shape[1]).sum(1)
    even = chosen_TE.sum() / count_RE.numel()
    rare_TE = (count_RE < share * even).repeat_interleave(window, dim=0)
    left_T1 = (chosen_TE & ~rare_TE).any(1, keepdim=True)
    return _without(weight_TE, rare_TE & left_T1)


def _without(weight_TE: Tensor, out_TE: Tensor) -> Tensor:
    """Weights with some at 0 and the rest of the token summing to 1; a token that loses none keeps
    its own to the bit."""
    left_TE = weight_TE.masked_fill(out_TE, 0)
    loses_T1 = (left_TE != weight_TE).any(1, keepdim=True)
    return torch.where(loses_T1, left_TE / left_TE.sum(1, keepdim=True), weight_TE)
