"""What routers and experts of a run chose in the text it held out, checkpoint by checkpoint.

The model is run as it is and its masks are recorded (moe/masks); a stock MoE is computed by our
experts, which then keep every neuron. Shapes: as in `choices`; L layers, P routed pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mone.studies.catalogue.analysis import CHUNKS
from megatron_mone.studies.measuring import choices
from megatron_mone.studies.measuring.held_out import held_out
from megatron_mone.studies.measuring.token_classes import CLASSES, classes_of
from megatron_mone.studies.tasks import Found

_LEAST_ID, _LEAST_NEURON = 16, 64
"""Occurrences of a token id, and rows of a neuron, below which a share says little."""


@dataclass(frozen=True)
class Layer:
    """What one layer of one checkpoint chose, and with which weights.

    Attributes:
        used_TEF: bool.
        weight_EFX: a neuron's gate, up and down vectors.
        picks: whether experts choose among their neurons.
    """

    used_TEF: Tensor
    weight_EFX: Tensor
    picks: bool

    @property
    def chosen_TE(self) -> Tensor:
        """Experts of each token."""
        return self.used_TEF.any(-1)

    def rows_of(self, expert: int) -> Tensor:
        """[N, F] of the tokens that chose an expert."""
        return self.used_TEF[self.chosen_TE[:, expert], expert]


def measure(checkpoints: str, windows: int) -> list[Found]:
    """All measures of a run.

    Args:
        checkpoints: folder of the run's checkpoints.
        windows: of held-out text.

    Raises:
        ValueError: the run has no checkpoint, or no such text.
    """
    folders = sorted(Path(checkpoints).glob("iter_*"))
    if not folders:
        raise ValueError(f"{checkpoints} has no checkpoint: train the run again")
    rows_RS = held_out(folders[-1], windows)
    last, texts = _layers(folders[-1], rows_RS)
    found = _at_the_end(last, rows_RS, texts)
    over: dict[str, list[tuple[float, float]]] = {}
    for folder in folders:
        layers = last if folder == folders[-1] else _layers(folder, rows_RS)[0]
        step = float(folder.name.removeprefix("iter_"))
        for number, layer in layers.items():
            for of, value in _now(layer, last[number], rows_RS[:, :-1].flatten()):
                over.setdefault(f"{of}, layer {number}", []).append((step, value))
    return found + [
        (of, [step for step, _ in points], [value for _, value in points])
        for of, points in over.items()
    ]


def _layers(folder: Path, rows_RS: Tensor) -> tuple[dict[int, Layer], list[str]]:
    """Number, counted from 1 -> layer; and the text of every token id."""
    from megatron_mone.evaluation.forward import Forward
    from megatron_mone.evaluation.ratio_losses import layers_of, opened
    from megatron_mone.kernels.neuron_bits import unpack_bits
    from megatron_mone.moe.masks.tape import record_masks
    from megatron_mone.moe.masks.trace import MaskTrace

    inputs_RS = rows_RS[:, :-1].contiguous()
    found = {}
    with opened(folder) as loaded:
        texts = [loaded.tokenizer.decode([one]) for one in range(loaded.tokenizer.size)]
        with record_masks(loaded.chunks, MaskTrace()) as trace:
            Forward(loaded)(inputs_RS, lambda logits, tokens: None)
        for before, layer in layers_of(loaded):
            experts = layer.experts
            keys_P, bits_PB = trace.recorded(0, before + 1).merged()
            neurons, size = experts.w_gate_EFH.shape[1], experts.num_local_experts
            used_PF = torch.zeros(inputs_RS.numel() * size, neurons, dtype=torch.bool)
            used_PF[keys_P] = unpack_bits(bits_PB, neurons).bool()
            parts = (experts.w_gate_EFH, experts.w_up_EFH, experts.w_down_EFH)
            found[before + 1] = Layer(
                used_PF.view(-1, size, neurons), torch.cat(parts, dim=-1).detach().clone(),
                experts.select.min_neurons < neurons,
            )  # fmt: skip
    return found, texts


def _now(layer: Layer, last: Layer, id_T: Tensor) -> Iterator[tuple[str, float]]:
    """Measures of a layer at one checkpoint, against the last."""
    chosen, random = layer.chosen_TE, torch.Generator().manual_seed(0)
    yield "router saturation", choices.saturation(chosen, last.chosen_TE)
    yield "router saturation by use alone", choices.by_use(chosen, last.chosen_TE)
    yield "experts: largest partner", choices.largest_partner(chosen)
    yield "favourite expert of a token id", choices.favourite_share(chosen, id_T, _LEAST_ID)
    by_lot = chosen[torch.randperm(len(chosen), generator=random)]
    yield "favourite expert by lot", choices.favourite_share(by_lot, id_T, _LEAST_ID)
    yield "similarity of experts", choices.similarity(layer.weight_EFX.flatten(1))
    yield "similarity of matched neurons", choices.matched_similarity(layer.weight_EFX)
    noise = torch.randn(layer.weight_EFX.shape, generator=random)
    yield "similarity of matched noise", choices.matched_similarity(noise)
    if layer.picks:
        yield from _masks_now(layer, last, random)


def _masks_now(layer: Layer, last: Layer, random: torch.Generator) -> Iterator[tuple[str, float]]:
    """The same of neurons within an expert: means over experts, weighted by their rows."""
    both_TE = layer.chosen_TE & last.chosen_TE
    pairs = [(layer.used_TEF[both, e], last.used_TEF[both, e]) for e, both in enumerate(both_TE.T)]
    yield "mask saturation", _mean([(choices.saturation(*one), len(one[0])) for one in pairs])
    yield "mask saturation by use alone", _mean([
        (choices.by_use(*one), len(one[0])) for one in pairs
    ])  # fmt: skip
    rows = [layer.rows_of(expert) for expert in range(both_TE.shape[1])]
    yield "neurons: largest partner", _mean([
        (choices.largest_partner(one, _LEAST_NEURON), len(one)) for one in rows
    ])  # fmt: skip
    yield "neurons: largest partner by use alone", _mean([
        (choices.largest_partner(choices.shuffled(one, random), _LEAST_NEURON), len(one))
        for one in rows
    ])  # fmt: skip


def _at_the_end(last: dict[int, Layer], rows_RS: Tensor, texts: list[str]) -> list[Found]:
    """Measures of the last checkpoint: by class of token, and by neighbouring tokens."""
    inputs_RS = rows_RS[:, :-1]
    class_T = torch.tensor(
        [place for row in inputs_RS.tolist() for place in classes_of([texts[one] for one in row])]
    )
    count_C = class_T.bincount(minlength=len(CLASSES)) / class_T.numel()
    found: list[Found] = [("share of tokens by class", range(len(CLASSES)), count_C.tolist())]
    for number, layer in last.items():
        chosen = layer.chosen_TE
        for of, value in (
            ("experts by class", choices.specialisation(chosen, class_T, len(CLASSES))),
            ("co-activation of experts", choices.co_activation(chosen)),
        ):
            found.append((f"{of}, layer {number}", range(value.numel()), value.flatten().tolist()))
        for of, values in _by_neighbours(layer, inputs_RS.shape[1]):
            found.append((f"{of}, layer {number}", CHUNKS, values))
    return found


def _by_neighbours(layer: Layer, window: int) -> Iterator[tuple[str, list[float]]]:
    """Shares that CHUNKS of neighbouring tokens, and of an expert's rows, use."""
    chosen, flat = layer.chosen_TE, layer.used_TEF.flatten(1)
    yield (
        "experts used by neighbours",
        [choices.used_by_chunks(chosen, size, window) for size in CHUNKS],
    )
    yield "used by neighbours", [choices.used_by_chunks(flat, size, window) for size in CHUNKS]
    yield "used by neighbours by use alone", [choices.used_by_chance(flat, k) for k in CHUNKS]
    if layer.picks:
        rows = [layer.rows_of(expert) for expert in range(chosen.shape[1])]
        for of, use in (
            ("used by an expert's rows", choices.used_by_chunks),
            ("used by an expert's rows by use alone", choices.used_by_chance),
        ):
            yield of, [_mean([(use(one, size), len(one)) for one in rows]) for size in CHUNKS]


def _mean(weighted: list[tuple[float, int]]) -> float:
    """Of (value, weight); a value without rows is left out."""
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted if weight) / max(1, total)
