"""What a text's loss becomes when fewer neurons are kept: in all layers, and in one at a time.

The weights are as they are; of the model only how many neurons an expert keeps is changed. Each
number is written as it is found, so that a stopped measurement goes on. May touch: the result file.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.files import read_text, write_json
from megatron_mone.evaluation.forward import Forward, log_probabilities
from megatron_mone.evaluation.loading import Loaded, load

SCHEMA = "megatron-mone/ratio-losses/1"
_ROWS = 4  # of a forward pass
Say = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Cell:
    """A loss to be measured: neurons kept in a layer, or in all; None is the model as it is."""

    layer: int | None
    ratio: str | None

    @property
    def name(self) -> str:
        """Its key in the file."""
        if self.ratio is None:
            return "as it is"
        return f"{self.ratio} in {'all layers' if self.layer is None else f'layer {self.layer}'}"


def measure(
    checkpoint: Path, text: Path, ratios: Sequence[Fraction], out: Path, say: Say, *,
    tokens: int, length: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure the loss of a text, in this process.

    Args:
        checkpoint: what a run saved or `convert` wrote; a dense model has only its loss.
        text: UTF-8; an end-of-document token is put in front.
        ratios: shares of an expert's neurons that are kept.
        out: the JSON file; numbers of the same model, text and sizes in it are kept.
        say: told numbers done.
        tokens: of the text, at most.
        length: tokens that see each other.

    Returns:
        The document: losses in nats a token.

    Raises:
        ValueError: one line: a wrong text, ratio or checkpoint.
    """
    words = read_text(text, "--text")
    with opened(checkpoint) as loaded:
        layers = dict(experts_of(loaded)) if ratios else {}
        for ratio in ratios if layers else ():
            _check(ratio, next(iter(layers.values())))
        rows = _rows(loaded, words, text, tokens, length)
        asked = {
            "checkpoint": str(checkpoint.resolve()), "iteration": int(loaded.args.iteration),
            "text": hashlib.sha256(words.encode()).hexdigest(), "tokens": rows.numel() - len(rows),
            "length": length,
        }  # fmt: skip
        names = [str(ratio) for ratio in ratios] if layers else []
        cells = [_Cell(None, None)]
        cells += [_Cell(layer, name) for name in names for layer in (None, *layers)]
        losses, forward = _known(out, asked), Forward(loaded)
        document = {
            "schema": SCHEMA, "measured": asked, "ratios": names, "layers": list(layers),
            "losses": losses,
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, document)
        for done, cell in enumerate(cells):
            say(done, len(cells), cell.name)
            if cell.name not in losses:
                chosen = layers if cell.layer is None else {cell.layer: layers[cell.layer]}
                with _keeping(list(chosen.values()) if cell.ratio else [], cell.ratio):
                    losses[cell.name] = loss_of(forward, rows)
                write_json(out, document)
        say(len(cells), len(cells), "measured")
    return document


@contextlib.contextmanager
def opened(checkpoint: Path) -> Iterator[Loaded]:
    """A model in this process, its experts computed by ours; Megatron's state is taken down at the
    end, and then another may be opened.

    Args:
        checkpoint: a run's folder of checkpoints, or that of one iteration.
    """
    from megatron.training.training import destroy_global_state

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron's own lines
            loaded = load(["--load", str(checkpoint), *_every_neuron(checkpoint)])
        yield loaded
    finally:
        destroy_global_state()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _every_neuron(checkpoint: Path) -> list[str]:
    """A flag that has stock experts computed by ours, whose neurons can be chosen."""
    from megatron_mone.evaluation.arguments import checkpoint_of
    from megatron_mone.model.saved_model import saved_arguments

    saved = saved_arguments(checkpoint_of(["--load", str(checkpoint)]))
    chooses = saved.get("mone_neuron_ratio") or saved.get("mone_neurons_per_token")
    return ["--mone-neuron-ratio", "1.0"] if saved.get("num_experts") and not chooses else []


def layers_of(loaded: Loaded) -> Iterator[tuple[int, Any]]:
    """Number, counted from 0, of each MoE layer whose experts' neurons can be chosen, and it."""
    from megatron_mone.moe.experts import MoNEExperts

    for chunk in loaded.chunks:
        for module in chunk.modules():
            mlp = getattr(module, "mlp", None)
            if isinstance(getattr(mlp, "experts", None), MoNEExperts):
                yield module.layer_number - 1, mlp


def experts_of(loaded: Loaded) -> Iterator[tuple[int, Any]]:
    """The same layers' numbers, and their experts."""
    return ((number, layer.experts) for number, layer in layers_of(loaded))


def _rows(loaded: Loaded, words: str, text: Path, tokens: int, length: int) -> Tensor:
    """[R, length + 1] ids; a row begins with the token that the one before ends with."""
    tokenizer = loaded.tokenizer
    ids = [tokenizer.eod, *tokenizer.encode(words[: 16 * tokens])][: tokens + 1]
    rows = (len(ids) - 1) // length
    if rows < 1:
        raise ValueError(
            f"--text {text} has {len(ids) - 1} tokens: give {length} or more, or a smaller --length"
        )
    return torch.tensor(ids[: rows * length + 1]).unfold(0, length + 1, length)


def _check(ratio: Fraction, experts: Any) -> None:
    config, unit = experts.config, experts.select.groups * experts.select.block
    kept = ratio * config.moe_ffn_hidden_size
    if config.mone_selection != "topk":
        raise ValueError(
            f"mone_selection = {config.mone_selection!r}: ratios are of the rule topk; leave out "
            "--ratios"
        )
    if kept.denominator != 1 or int(kept) % unit or not 0 < ratio <= 1:
        raise ValueError(
            f"--ratios {ratio}: {ratio} of {config.moe_ffn_hidden_size} neurons is no multiple of "
            f"{unit} from {unit} to all"
        )


def _known(out: Path, asked: dict[str, Any]) -> dict[str, float]:
    """Losses that stand in the file for the same question."""
    if not out.is_file():
        return {}
    try:
        document = json.loads(out.read_text(encoding="utf-8"))
        same = document["schema"] == SCHEMA and document["measured"] == asked
        return dict(document["losses"]) if same else {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--out {out} is another file: choose a new one, or delete it") from None


@contextlib.contextmanager
def _keeping(layers: Sequence[Any], ratio: str | None) -> Iterator[None]:
    """Have some layers' experts keep a share of their neurons."""
    before = [experts.select for experts in layers]
    try:
        for experts in layers:
            kept = int(Fraction(str(ratio)) * experts.config.moe_ffn_hidden_size)
            experts.select = replace(experts.select, min_neurons=kept, max_neurons=kept)
        yield
    finally:
        for experts, select in zip(layers, before, strict=True):
            experts.select = select


def loss_of(forward: Forward, rows: Tensor, batch: int = _ROWS) -> float:
    """Nats a token.

    Args:
        forward: asks the model.
        rows: [R, length + 1] ids.
        batch: rows of a forward pass.
    """
    total = 0.0
    for part in rows.split(batch):
        wanted = part[:, 1:].cuda()

        def read(logits: Tensor, tokens: Tensor, wanted: Tensor = wanted) -> float:
            return log_probabilities(logits, wanted).double().sum().item()

        total -= sum(forward(part[:, :-1].contiguous(), read))
    return total / (rows.numel() - len(rows))
