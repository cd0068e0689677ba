"""A dense model of transformers run on text, to carve its FFNs by what their neurons do.

The model is in memory whole. The first three quarters of the text choose neurons and fit routers, a
layer at a time as its input comes by; the last quarter says what the carved model loses. May touch:
transformers, the folder, reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.files import read_text
from megatron_mone.conversion.made_experts import LayerPlan
from megatron_mone.conversion.neuron_groups import fitted_router, random_split, split_by_firing

_LENGTH = 256  # tokens that see each other
_MEASURED = 1 / 4

Step = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibrated:
    """What a text says of a model that is to be carved.

    Attributes:
        plans: of each layer.
        errors: of each layer, |y - carved y| / |y| on the tokens that chose.
        loss_before: nats a token on the text's last quarter, of the dense model.
        loss_after: of the carved one, before any training.
        tokens: (that chose, that were measured).
    """

    plans: list[LayerPlan]
    errors: list[float]
    loss_before: float
    loss_after: float
    tokens: tuple[int, int]

    def summary(self) -> dict[str, Any]:
        """As JSON says it."""
        return {
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "error_by_layer": self.errors,
            "tokens_that_chose": self.tokens[0],
            "tokens_measured": self.tokens[1],
        }


@dataclass(frozen=True)
class _Cut:
    """How a layer is carved."""

    experts: int
    topk: int
    shared: int
    by_firing: bool
    seed: int


@torch.no_grad()
def calibrate(
    folder: Path, text: Path, step: Step, *, experts: int, topk: int, shared: int, by_firing: bool,
    tokens: int, seed: int,
) -> Calibrated:  # fmt: skip
    """Carve the FFNs of a dense model by what they do with a text.

    Args:
        folder: a Hugging Face model with gate_proj, up_proj and down_proj in each layer's mlp, and
            its tokenizer.
        text: UTF-8.
        step: told layers and rows done.
        experts: E.
        topk: experts of a token.
        shared: neurons of the shared expert.
        by_firing: choose by what fires together; else by lot, and only routers are fitted.
        tokens: of the text, at most.
        seed: of what is drawn.

    Raises:
        ValueError: no such text, too short a one, or a model that cannot be run; one line.
    """
    from megatron_mone.conversion.hf_model.loading import load_model, load_tokenizer

    words = read_text(text, "--text")
    model = load_model(folder, dtype="float32").model
    tokenizer = load_tokenizer(folder, model)
    ids = tokenizer(words[: 16 * tokens], return_tensors="pt", verbose=False).input_ids[0][:tokens]
    rows = len(ids) // _LENGTH
    if rows < 2:
        raise ValueError(f"--text {text} has {len(ids)} tokens: give {2 * _LENGTH} or more")
    rows_RS = ids[: rows * _LENGTH].view(rows, _LENGTH)
    measured = max(1, round(rows * _MEASURED))
    cut = _Cut(experts, topk, shared, by_firing, seed)
    layers = model.model.layers
    plans: list[LayerPlan] = []
    errors: list[float] = []

    def carve(mlp: Any, args: tuple[Tensor], output: Tensor) -> None:
        plan, error = _carve(mlp, args[0].flatten(0, 1), cut, len(plans))
        plans.append(plan)
        errors.append(error)
        step(len(plans), len(layers), "carve")

    with _hooked(layers, lambda _: carve):
        model.model(rows_RS[:-measured], use_cache=False)
    before = _loss(model, rows_RS[-measured:], lambda done: step(done, 2 * measured, "measure"))

    def replaced(layer: int) -> Callable[..., Tensor]:
        def output(mlp: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
            x_TH = args[0].flatten(0, 1)
            return _output(mlp, x_TH, _hidden(mlp, x_TH), plans[layer], topk).view_as(output)

        return output

    with _hooked(layers, replaced):
        after = _loss(
            model, rows_RS[-measured:], lambda done: step(measured + done, 2 * measured, "measure")
        )
    chose = (rows - measured) * _LENGTH
    return Calibrated(plans, errors, before, after, (chose, measured * (_LENGTH - 1)))


@contextmanager
def _hooked(layers: Any, hook_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    hooks = [one.mlp.register_forward_hook(hook_of(n)) for n, one in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _loss(model: Any, rows_RS: Tensor, told: Callable[[int], None]) -> float:
    total = 0.0
    for done, row in enumerate(rows_RS.split(1)):
        total += model(row, labels=row, use_cache=False).loss.item()
        told(done + 1)
    return total / len(rows_RS)


def _carve(mlp: Any, x_TH: Tensor, cut: _Cut, layer: int) -> tuple[LayerPlan, float]:
    """A layer's plan, and what its output is off by on these tokens."""
    hidden_TF = _hidden(mlp, x_TH)
    if cut.by_firing:
        strength_TF = hidden_TF.abs() * mlp.down_proj.weight.norm(dim=0)
        groups, shared = split_by_firing(strength_TF, cut.experts, cut.shared, cut.seed + layer)
    else:
        groups, shared = random_split(hidden_TF.shape[1], cut.experts, cut.shared, cut.seed + layer)
    parts = [(0, group) for group in groups]
    router = torch.zeros(cut.experts, x_TH.shape[1])
    if cut.topk < cut.experts:
        size_TE = torch.stack([_part(mlp, hidden_TF, one).norm(dim=1) for one in groups], dim=1)
        router = fitted_router(x_TH, size_TE)
    plan = LayerPlan(parts, router, shared)
    carved_TH, dense_TH = _output(mlp, x_TH, hidden_TF, plan, cut.topk), mlp.down_proj(hidden_TF)
    return plan, ((carved_TH - dense_TH).norm() / dense_TH.norm()).item()


def _hidden(mlp: Any, x_TH: Tensor) -> Tensor:
    return mlp.act_fn(mlp.gate_proj(x_TH)) * mlp.up_proj(x_TH)


def _part(mlp: Any, hidden_TF: Tensor, neurons: Tensor) -> Tensor:
    """What some neurons add to the output, [T, H]."""
    return hidden_TF[:, neurons] @ mlp.down_proj.weight[:, neurons].t()


def _output(mlp: Any, x_TH: Tensor, hidden_TF: Tensor, plan: LayerPlan, topk: int) -> Tensor:
    """[T, H] of the carved layer."""
    logits_TK, chosen_TK = (x_TH @ plan.router.t()).topk(topk, dim=1)
    weights_TE = torch.zeros(len(x_TH), len(plan.experts))
    weights_TE.scatter_(1, chosen_TK, logits_TK.softmax(dim=1) * topk)
    weights_TF = torch.zeros_like(hidden_TF)
    weights_TF[:, plan.shared] = 1.0
    for expert, (_, neurons) in enumerate(plan.experts):
        weights_TF[:, neurons] = weights_TE[:, expert, None]
    return mlp.down_proj(hidden_TF * weights_TF)
