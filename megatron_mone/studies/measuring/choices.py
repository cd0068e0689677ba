"""Measures of what a layer chose: experts by its router, neurons by its experts. Pure.

Shapes: T tokens in the order of the text, E experts, F neurons of one, C classes, N routed rows of
one expert in the order of the text. `used_TEF` says which neurons of which experts a token used;
`chosen_TE` which experts. Sources: OLMoE (arXiv 2409.02060, equations 5 to 8) for saturation,
co-activation and specialisation, which FLAME-MoE (arXiv 2505.20225) measures too, with the same
formulas in its code; BlockFFN (arXiv 2507.08771) for the use of chunks of tokens; "A Closer Look
into Mixture-of-Experts" (arXiv 2406.18219, its code) for the similarity of experts.
"""

import torch
from torch import Tensor


def saturation(now_XY: Tensor, last_XY: Tensor) -> float:
    """Share of what is chosen at last that was chosen before, mean over the rows.

    OLMoE's |E(t) and E(T)| / k; of neurons, the same within a routed row.

    Args:
        now_XY, last_XY: bool, at one checkpoint and at the last; every row of the last chooses.
    """
    return float(((now_XY & last_XY).sum(-1) / last_XY.sum(-1)).mean())


def by_use(now_NF: Tensor, last_NF: Tensor) -> float:
    """What `saturation` would be if rows chose by the neurons' shares of use alone."""
    shares_F = now_NF.float().mean(0) * last_NF.float().mean(0)
    return float(shares_F.sum() / last_NF.float().sum(-1).mean())


def co_activation(chosen_NX: Tensor) -> Tensor:
    """[X, X]: N_ij / N_i, rows that chose i and j of those that chose i (OLMoE); 0 without rows.

    OLMoE's script counts i and j only where one follows the other in rank; the paper's formula, and
    this, wherever both are chosen.

    Args:
        chosen_NX: bool, of experts by token or of neurons by routed row.
    """
    chosen = chosen_NX.float()
    both_XX = chosen.T @ chosen
    return both_XX / both_XX.diagonal().clamp(min=1)[:, None]


def largest_partner(chosen_NX: Tensor, least: int = 1) -> float:
    """Largest co-activation of each with another, mean over those that `least` rows chose."""
    share_XX = co_activation(chosen_NX).fill_diagonal_(0)
    often_X = chosen_NX.sum(0) >= least
    return float(share_XX[often_X].amax(1).mean()) if bool(often_X.any()) else 0.0


def shuffled(chosen_NX: Tensor, generator: torch.Generator) -> Tensor:
    """The same shares of use, each column in a random order of rows: co-activation by chance."""
    order_NX = torch.rand(chosen_NX.shape, generator=generator).argsort(0)
    return chosen_NX.gather(0, order_NX)


def specialisation(chosen_TE: Tensor, class_T: Tensor, classes: int) -> Tensor:
    """[C, E]: share of a class's tokens that chose an expert (OLMoE's domain specialisation, with
    classes of tokens for domains); 0 of a class without tokens."""
    member_TC = torch.nn.functional.one_hot(class_T, classes).float()
    return member_TC.T @ chosen_TE.float() / member_TC.sum(0).clamp(min=1)[:, None]


def favourite_share(chosen_TE: Tensor, id_T: Tensor, least: int) -> float:
    """Share of a token id's occurrences that chose its favourite expert, mean over occurrences of
    the ids that occur `least` times: OLMoE's vocabulary specialisation, of the best expert. OLMoE
    shows it of a token's first expert and as a mean over ids; here any of the K counts, and an id
    as often as it occurs."""
    share_IE = specialisation(chosen_TE, id_T, int(id_T.max()) + 1)
    count_I = id_T.bincount(minlength=len(share_IE)).float()
    count_I[count_I < least] = 0
    return float((share_IE.amax(1) * count_I).sum() / count_I.sum().clamp(min=1))


def used_by_chunks(used_NX: Tensor, size: int, window: int | None = None) -> float:
    """Mean share of X used by any of `size` neighbouring rows: 1 - BlockFFN's chunk-level sparsity,
    CLS, of its chunks that do not overlap.

    Args:
        used_NX: bool.
        size: rows of a chunk; chunks do not overlap, and what is left over is left out.
        window: rows after which the text breaks off; chunks are within windows. None: it does not.
    """
    rows, width = used_NX.shape
    window = window or rows
    chunks = window // size
    if not (rows and chunks):
        return 0.0
    inside = used_NX[: rows // window * window].view(-1, window, width)[:, : chunks * size]
    return float(inside.reshape(-1, size, width).any(1).float().mean())


def used_by_chance(used_NX: Tensor, size: int) -> float:
    """What `used_by_chunks` would be if rows chose apart from each other: 1 - (1 - share)^size."""
    return float((1 - (1 - used_NX.float().mean(0)) ** size).mean())


def similarity(weight_EX: Tensor) -> float:
    """Absolute cosine of two experts' weights as they lie, mean over pairs: A Closer Look has the
    cosine with its sign, and of the gate, up and down matrix each by itself; here all three are one
    vector, and no measure is below 0."""
    unit_EX = torch.nn.functional.normalize(weight_EX.float(), dim=1)
    first, second = torch.triu_indices(len(unit_EX), len(unit_EX), offset=1)
    return float((unit_EX @ unit_EX.T)[first, second].abs().mean())


def matched_similarity(weight_EFX: Tensor) -> float:
    """Mean cosine of matched neurons of two experts, mean over pairs of experts.

    The order of an expert's neurons means nothing; A Closer Look therefore reorders them by an
    optimal assignment, of each of the three matrices by itself, and takes the cosine of whole
    matrices. Here a neuron's vectors stay together, the most alike are matched first, which finds
    no more than the best assignment of the same does, and cosines are of neurons.

    Args:
        weight_EFX: a neuron's gate, up and down vectors, one after another.
    """
    unit_EFX = torch.nn.functional.normalize(weight_EFX.float(), dim=2)
    pairs = torch.triu_indices(len(unit_EFX), len(unit_EFX), offset=1).T
    alike_PFF = torch.stack([unit_EFX[one] @ unit_EFX[other].T for one, other in pairs.tolist()])
    neurons = alike_PFF.shape[1]
    total_P = torch.zeros(len(pairs))
    for _ in range(neurons):
        value_P, at_P = alike_PFF.flatten(1).max(1)
        total_P += value_P
        every_P = torch.arange(len(pairs))
        alike_PFF[every_P, at_P // neurons, :] = -torch.inf
        alike_PFF[every_P, :, at_P % neurons] = -torch.inf
    return float((total_P / neurons).mean())
