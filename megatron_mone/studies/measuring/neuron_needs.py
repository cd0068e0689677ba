"""Tasks of the study `sparsity`: how a model fares with fewer activated neurons, without training.

A model is a Hugging Face folder; a run's checkpoint is written as one first. What is measured comes
a value a block of text or a question, at each share that is kept, so that shares can be compared
block by block. Nats are of a token. May touch: the folders that it is given; temporary files.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.studies.measuring.kept_neurons import (
    GatedPart,
    Keep,
    Rows,
    Watch,
    chosen_by_itself,
    gated_parts,
    kept_of,
    watched,
)
from megatron_mone.studies.measuring.sparsity_names import (
    AS_IT_IS,
    ASKED,
    CHANCE,
    GATE,
    LAYERS_AS_THEY_ARE,
    LENGTH,
    LOSS,
    MASS,
    ONE_LAYER,
    OWN,
    PRODUCT,
    RIGHT,
    SHARES,
    SIZES,
    USE,
    USE_QUANTILES,
    USED,
    parts_of,
)
from megatron_mone.studies.tasks import Found

_BINS = (-8, 3, 44)  # powers of ten, and how many
_HELD_OUT = 0.05
"""Of the corpus' documents, as `split` 950,50,0 has it."""
_ROWS = 4  # of a forward pass


@dataclass(frozen=True)
class Model:
    """A model that can be measured.

    Attributes:
        network: transformers' own.
        tokenizer: transformers' own.
        parts: whose neurons are kept or not.
        shares: that are measured, the largest first.
    """

    network: Any
    tokenizer: Any
    parts: list[GatedPart]

    @property
    def own(self) -> float:
        """The share that it keeps as it is."""
        return chosen_by_itself(self.parts[0])

    @property
    def shares(self) -> list[float]:
        """That are measured, the largest first: also the one that it was trained with."""
        return sorted({*SHARES, self.own}, reverse=True)


def of_model(
    folder: str, part: str, text: str | None, tokens: int, length: int, layer_tokens: int,
    questions: int, seen: Any = None,
) -> list[Found]:  # fmt: skip
    """Measure a part of what is asked of a model.

    Args:
        folder: of a Hugging Face model.
        part: of `parts_of`.
        text: file that no model was trained on; the corpus' held-out documents when None.
        tokens: of it that are predicted.
        length: of a block, whose tokens see each other.
        layer_tokens: predicted where one layer keeps fewer.
        questions: of each task, at most.
        seen: what tells one state of folder and text from another; not read.

    Raises:
        ValueError: one line: a wrong folder, a model without gated FFNs, a text too short.
    """
    del seen
    model = _loaded(Path(folder))
    kind, _, of = part.partition(":")
    if kind == "answers":
        return _answers(model, of, questions)
    rows = blocks(model, _text(text), text or "the corpus", tokens, length)
    few = rows[:: max(1, tokens // layer_tokens)]
    if kind == "layers":
        return _layers(model, few, float(of))
    return _losses(model, rows, of) if kind == "losses" else _itself(model, rows, few)


def of_run(run: str, answers: bool, **asked: Any) -> list[Found]:
    """Measure all of what is asked of a run's last checkpoint, as `of_model` does; answers by one
    criterion alone, for a model that small knows few."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = _exported(Path(run), Path(scratch) / "model")
        parts = [*parts_of(False), *([f"answers:{GATE}"] if answers else [])]
        return [found for part in parts for found in of_model(str(folder), part, **asked)]


def _exported(run: Path, folder: Path) -> Path:
    from megatron_mone.conversion.exporting import export_model

    export_model(run / "checkpoints", folder, lambda *told: None, mone=True)
    return folder


def _loaded(folder: Path) -> Model:
    from megatron_mone.conversion.hf_model.loading import load_model, load_tokenizer

    network = load_model(folder, dtype="float32").model
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parts = gated_parts(network)
    except ValueError as error:
        raise ValueError(f"--model {folder}: {error}") from error
    return Model(network, load_tokenizer(folder, network), parts)


def _text(file: str | None) -> str:
    """The words of a file, or of the corpus' documents that the studies' runs do not train on."""
    from megatron_mone.common.files import read_text
    from megatron_mone.data.corpus import fetch_shakespeare

    if file is not None:
        return read_text(Path(file), "--text")
    documents = fetch_shakespeare()
    last = documents[round(len(documents) * (1 - _HELD_OUT)) :]
    return "\n".join(path.read_text(encoding="utf-8") for path in last)


def blocks(model: Model, words: str, name: str, tokens: int, length: int) -> Tensor:
    """[B, length + 1] ids: blocks that lie evenly over a text, each behind a text's end.

    Raises:
        ValueError: the text is shorter than what is asked for, or than a block.
    """
    length = min(length, model.network.config.max_position_embeddings)
    count = tokens // length
    ids = model.tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    if count < 1 or len(ids) < count * length:
        raise ValueError(
            f"--text: {name} has {len(ids)} tokens, {max(count, 1) * length} are asked for: give a "
            "longer one"
        )
    end = model.tokenizer.eos_token_id
    starts = [round(n * (len(ids) - length) / max(1, count - 1)) for n in range(count)]
    first = [[end if end is not None else ids[max(0, at - 1)], *ids[at : at + length]]
             for at in starts]  # fmt: skip
    return torch.tensor(first)


@torch.no_grad()
def block_losses(model: Model, rows: Tensor, watch: Watch | None = None,
                 parts: Sequence[GatedPart] | None = None) -> list[float]:  # fmt: skip
    """Nats a token of each block.

    Args:
        model: asked.
        rows: of `blocks`.
        watch: what its parts' neurons go through; the model as it is when None.
        parts: that are watched; all when None.
    """
    chosen = model.parts if parts is None else parts
    found: list[float] = []
    with watched(chosen, watch) if watch else _as_it_is():
        for part in rows.split(_ROWS):
            part = part.to(model.network.device)
            logits = model.network(part[:, :-1], use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="none"
            )
            found += losses.view(len(part), -1).double().mean(1).tolist()
    return found


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _spread(of: str, values: dict[float, list[float]]) -> Found:
    """Values of blocks or questions at each place, in order."""
    return (
        of,
        [x for x, listed in values.items() for _ in listed],
        [y for listed in values.values() for y in listed],
    )


def _losses(model: Model, rows: Tensor, criterion: str) -> list[Found]:
    found = {share: block_losses(model, rows, Keep(criterion, share)) for share in model.shares}
    return [_spread(LOSS.format(criterion), found)]


def _layers(model: Model, rows: Tensor, share: float) -> list[Found]:
    found = {
        float(part.layer): block_losses(model, rows, Keep(GATE, share), [part])
        for part in model.parts
    }
    return [_spread(ONE_LAYER.format(share), found)]


def _itself(model: Model, rows: Tensor, few: Tensor) -> list[Found]:
    """As it is, and how its activations and the use of its neurons are distributed."""
    count = Count(model.parts)
    block_losses(model, rows, count)
    return [
        (OWN, [0], [model.own]),
        (LENGTH, [0], [rows.shape[1] - 1]),
        _spread(AS_IT_IS, {model.own: block_losses(model, rows)}),
        _spread(LAYERS_AS_THEY_ARE, {model.own: block_losses(model, few)}),
        *count.found(),
    ]


class Count:
    """Counts sizes of |gate|, the mass of a row's largest, and how often neurons are kept; what it
    watches is not changed."""

    def __init__(self, parts: Sequence[GatedPart]) -> None:
        low, high, number = _BINS
        self.edges = torch.linspace(low, high, number + 1)
        self.sizes = torch.zeros(number, dtype=torch.float64)
        self.mass = {one: torch.zeros(len(SHARES)) for one in (GATE, PRODUCT)}
        self.rows = 0
        self.kept = {part: torch.zeros(part.norm_EF.shape) for part in parts}
        self.seen = {part: torch.zeros(len(part.norm_EF), 1) for part in parts}

    def __call__(self, rows: Rows) -> Tensor:
        """Count some rows."""
        part, size_NF = rows.part, rows.gate_NF.abs().float()
        logarithms = size_NF.clamp(min=1e-30).log10().clamp(*_BINS[:2])
        self.sizes += torch.histogram(logarithms.flatten().cpu(), self.edges).hist.double()
        most = [kept_of(share, part.neurons) - 1 for share in SHARES]
        for name, one_NF in zip(self.mass, (size_NF, rows.h_NF.abs().float()), strict=True):
            sums_NF = one_NF.sort(dim=1, descending=True).values.cumsum(1)
            shares = sums_NF[:, most] / sums_NF[:, -1:].clamp(min=1e-30)
            self.mass[name] += shares.sum(0).cpu()
        self.rows += len(size_NF)
        mask_NF = (Keep(GATE, USED)(Rows(part, rows.expert_N, size_NF, size_NF,
                                         torch.ones_like(size_NF))) != 0).float().cpu()  # fmt: skip
        experts = rows.expert_N.cpu()
        self.kept[part].index_add_(0, experts, mask_NF)
        self.seen[part].index_add_(0, experts, torch.ones(len(experts), 1))
        return rows.h_NF

    def found(self) -> list[Found]:
        """Distributions over all rows, and quantiles over neurons of how often they are kept, as a
        multiple of an even use."""
        middles = (self.edges[1:] + self.edges[:-1]).double() / 2
        uses = [
            (kept / seen / USED)[seen[:, 0] > 0].flatten()
            for kept, seen in zip(self.kept.values(), self.seen.values(), strict=True)
        ]
        quantiles = torch.cat(uses).double().quantile(torch.tensor(USE_QUANTILES).double())
        return [
            (SIZES, (10.0**middles).tolist(), (self.sizes / self.sizes.sum()).tolist()),
            *((MASS.format(n), SHARES, (m / self.rows).tolist()) for n, m in self.mass.items()),
            (USE, USE_QUANTILES, quantiles.tolist()),
        ]


def _answers(model: Model, criterion: str, questions: int) -> list[Found]:
    """Whether each question was answered right, 1 or 0, at each share."""
    from lm_eval.models.huggingface import HFLM

    from megatron_mone.evaluation.harness import evaluate, prepare

    asker = HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=8)
    prepared = prepare([*ASKED], None)
    found = {}
    for share in model.shares:
        with watched(model.parts, Keep(criterion, share)):
            samples = evaluate(asker, prepared, questions, {}).samples
        found[share] = [float(one["metrics"]["acc"]) for task in ASKED for one in samples[task]]
    by_chance = [ASKED[task] for task in ASKED for _ in samples[task]]
    return [
        _spread(RIGHT.format(criterion), found),
        (CHANCE, [0], [sum(by_chance) / len(by_chance)]),
    ]
