"""A run's last checkpoint without some of its experts or neurons: what it loses, by what chose.

What is removed is chosen on windows of held-out text and measured on others.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_mone.studies.catalogue.prune import (
    ALONE,
    BY_SCORE,
    BY_USE,
    EXPERTS,
    LARGEST,
    NEURONS,
    RANDOM,
    SCORE_SHARES,
    SKIPPED,
    USE_SHARES,
)
from megatron_mone.studies.measuring import expert_scores
from megatron_mone.studies.measuring.expert_scores import lowest
from megatron_mone.studies.measuring.held_out import held_out
from megatron_mone.studies.measuring.neuron_scores import SCORES
from megatron_mone.studies.measuring.pruned_model import Pruned, Seen
from megatron_mone.studies.tasks import Found


def measure(checkpoints: str, windows: int, recorded: int, draws: int) -> list[Found]:
    """All losses of a run without experts and without neurons.

    Args:
        checkpoints: folder of the run's checkpoints.
        windows: of the text that losses are of.
        recorded: windows of the text that chooses.
        draws: of what is removed by lot; their mean loss is told.

    Raises:
        ValueError: no checkpoint, no such text, or a router of another rule.
    """
    from megatron_mone.evaluation.ratio_losses import opened

    folders = sorted(Path(checkpoints).glob("iter_*"))
    if not folders:
        raise ValueError(f"{checkpoints} has no checkpoint: train the run again")
    rows_RS = held_out(folders[-1], windows, 0, 2)
    chooses_RS = held_out(folders[-1], recorded, 1, 2)
    with opened(folders[-1]) as loaded:
        model = Pruned(loaded, rows_RS)
        seen = model.record(chooses_RS)
        return [
            *_experts(model, seen, draws), *_alone(model, seen), *_skipping(model),
            *_neurons(model, seen, draws),
        ]  # fmt: skip


def _experts(model: Pruned, seen: Mapping[int, Seen], draws: int) -> Iterator[Found]:
    """Losses by share of experts removed, the same number in every layer."""
    size = next(iter(seen.values())).logits_TE.shape[1]
    counts = range(size - model.topk + 1)
    shares = [count / size for count in counts]
    for name in EXPERTS:
        losses = [
            model.without_experts(
                {n: chosen(name, model, n, one, count) for n, one in seen.items()}
            )
            for count in counts
        ]
        yield f"experts by {name}", shares, losses
    lots = [
        [model.without_experts(_lot(seen, count, draw)) for count in counts]
        for draw in range(draws)
    ]
    yield f"experts by {RANDOM}", shares, [sum(one) / draws for one in zip(*lots, strict=True)]


def chosen(name: str, model: Pruned, number: int, one: Seen, count: int) -> tuple[int, ...]:
    """The `count` experts of a layer that a criterion removes."""
    if name == "reconstruction":
        return expert_scores.by_reconstruction(one.logits_TE, one.output_TEH, model.topk, count)
    if name == "similarity (STUN)":
        experts = model.layers[number].experts
        parts = (experts.w_gate_EFH, experts.w_up_EFH, experts.w_down_EFH)
        router_EH = model.layers[number].router.weight.detach()
        weight_EX = torch.cat([part.detach().flatten(1) for part in parts], dim=1)
        return expert_scores.by_similarity(router_EH, weight_EX, count)
    scores = {
        "frequency": lambda: expert_scores.frequency(one.weight_TE),
        "router weight": lambda: expert_scores.mean_probability(one.logits_TE),
        "output norm": lambda: expert_scores.output_norm(one.weight_TE, one.output_TEH),
        "REAP": lambda: expert_scores.reap(one.weight_TE, one.output_TEH),
    }
    return lowest(scores[name](), count)


def _lot(seen: Mapping[int, Seen], count: int, draw: int) -> dict[int, tuple[int, ...]]:
    random = torch.Generator().manual_seed(draw)
    return {
        number: lowest(torch.rand(one.logits_TE.shape[1], generator=random), count)
        for number, one in seen.items()
    }


def _alone(model: Pruned, seen: Mapping[int, Seen]) -> Iterator[Found]:
    """Losses without one expert, and the largest entry of each expert's output for its tokens."""
    for number, one in seen.items():
        every = range(one.logits_TE.shape[1])
        losses = [model.without_experts({number: [expert]}) for expert in every]
        yield f"{ALONE}, layer {number}", every, losses
        largest_TE = one.output_TEH.abs().amax(2) * (one.weight_TE > 0)
        yield f"{LARGEST}, layer {number}", every, largest_TE.amax(0).tolist()


def _skipping(model: Pruned) -> Iterator[Found]:
    """Losses by how small a weight, and how rare an expert in its sequence, is left out."""
    by_score = expert_scores.skipped_by_score
    by_use = partial(expert_scores.skipped_by_use, window=model.window)
    for of, shares, rule in ((BY_SCORE, SCORE_SHARES, by_score), (BY_USE, USE_SHARES, by_use)):
        found = [model.skipping(partial(rule, share=share)) for share in shares]
        yield of, shares, [loss for loss, _ in found]
        yield SKIPPED + of, shares, [left_out for _, left_out in found]


def _neurons(model: Pruned, seen: Mapping[int, Seen], draws: int) -> Iterator[Found]:
    """Losses by share of neurons removed, the same number in every expert."""
    width = next(iter(seen.values())).rows[0].g_NF.shape[1]
    counts = [round(width * share) for share in NEURONS]
    for name, score in SCORES.items():
        scores = {number: [score(rows) for rows in one.rows] for number, one in seen.items()}
        yield f"neurons by {name}", NEURONS, [_without(model, scores, count) for count in counts]
    lots = []
    for draw in range(draws):
        random = torch.Generator().manual_seed(draw)
        scores = {
            number: [torch.rand(width, generator=random) for _ in one.rows]
            for number, one in seen.items()
        }
        lots.append([_without(model, scores, count) for count in counts])
    yield f"neurons by {RANDOM}", NEURONS, [sum(one) / draws for one in zip(*lots, strict=True)]


def _without(model: Pruned, scores: Mapping[int, Sequence[Tensor]], count: int) -> float:
    return model.without_neurons({
        number: [lowest(one, count) for one in by_expert] for number, by_expert in scores.items()
    })  # fmt: skip
