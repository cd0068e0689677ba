"""Dense Hugging Face folders -> a checkpoint with experts: carve, upcycle, merge.

May touch: the output folder.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mone.conversion.families import Family, family_of
from megatron_mone.conversion.folders import Step, refuse_existing
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.hf_folder import Weights
from megatron_mone.conversion.importing import Origin, fingerprint, refuse_notes, write_checkpoint
from megatron_mone.conversion.inspect import shape_file
from megatron_mone.conversion.made_experts import (
    MadeWeights,
    Recipe,
    as_experts,
    carved,
    merged,
    upcycled,
)
from megatron_mone.conversion.placing import words_of_shape
from megatron_mone.conversion.shape import Shape

SUMMARY = "experts.json"
"""Beside the checkpoint: how its experts were made, and what a text said of it."""


class Dense:
    """A folder of a dense model.

    Args:
        folder: of it.
        differs: also one of which Megatron computes something else.

    Raises:
        ValueError: no such model, or one with experts; one line.
    """

    def __init__(self, folder: Path, differs: bool) -> None:
        self.config = HFConfig.read(folder)
        self.family: Family = family_of(self.config)
        self.shape: Shape = self.family.shape(self.config)
        if "num_experts" in self.shape:
            raise ValueError(
                f"{self.config.path}: a {self.family.name} model has experts: convert import "
                "--mone NAME makes it a MoNE model as it is"
            )
        refuse_notes(self.config, differs)
        self.weights = Weights(self.config.path.parent)


def carve(
    source: Path, out: Path, step: Step, *, experts: int, topk: int, shared: int = 0,
    by: str = "random", text: Path | None = None, tokens: int = 4096, mone: str | None = None,
    seed: int = 1, differs: bool = False,
) -> list[str]:  # fmt: skip
    """Divide the neurons of each FFN among experts.

    Args:
        source: folder of a dense model.
        out: the checkpoint folder; must not be there.
        step: told of the progress.
        experts: E.
        topk: experts of a token; all of them give the dense model's output.
        shared: neurons of a shared expert.
        by: "random", or "coactivation": those that fire together on the text.
        text: UTF-8 file, of which routers are fitted and the loss is measured.
        tokens: of it, at most.
        mone: of configs/mone.
        seed: of what is drawn.
        differs: as import_model.

    Returns:
        What was measured, and what is not in the checkpoint, a line each.

    Raises:
        ValueError: one line; `out` is not made.
    """
    refuse_existing(out)
    dense = Dense(source, differs)
    if by == "coactivation" and text is None:
        raise ValueError("--by coactivation: give --text FILE, on which neurons fire")
    recipe = carved(dense.shape, experts, topk, shared, seed)  # refuses before the model runs
    facts: dict[str, Any] = {"shared_neurons": shared, "by": by}
    said = []
    if text is not None:
        from megatron_mone.conversion.calibration import calibrate

        found = calibrate(
            dense.config.path.parent, text, step, experts=experts, topk=topk, shared=shared,
            by_firing=by == "coactivation", tokens=tokens, seed=seed,
        )  # fmt: skip
        recipe = carved(dense.shape, experts, topk, shared, seed, found.plans)
        facts |= {"text": hashlib.sha256(text.read_bytes()).hexdigest(), **found.summary()}
        said.append(
            f"loss on {found.tokens[1]:,} tokens of {text}: {found.loss_before:.4f} dense, "
            f"{found.loss_after:.4f} with {topk} of {experts} experts, all neurons of each"
        )
    return said + _make(recipe, [dense], out, step, mone, seed, facts)


def upcycle(
    source: Path, out: Path, step: Step, *, experts: int, topk: int, granularity: int = 1,
    redrawn: float = 0.0, mone: str | None = None, seed: int = 1, differs: bool = False,
) -> list[str]:  # fmt: skip
    """Copy each FFN into experts; arguments as `carve`'s and `upcycled`'s."""
    refuse_existing(out)
    dense = Dense(source, differs)
    recipe = upcycled(dense.shape, experts, topk, granularity, redrawn, seed)
    facts = {"granularity": granularity, "redrawn": redrawn}
    return _make(recipe, [dense], out, step, mone, seed, facts)


def merge(
    sources: Sequence[Path], out: Path, step: Step, *, topk: int, attention: str = "average",
    mone: str | None = None, seed: int = 1, differs: bool = False,
) -> list[str]:  # fmt: skip
    """Make the FFN of each of several models of one shape an expert.

    Args:
        sources: their folders; tokenizer and config are the first's.
        out: the checkpoint folder; must not be there.
        step: told of the progress.
        topk: experts of a token.
        attention: what all else is: "average", or "1", "2", ...: of that source.
        mone: of configs/mone.
        seed: of the router.
        differs: as import_model.

    Raises:
        ValueError: one line; `out` is not made.
    """
    refuse_existing(out)
    if len(sources) < 2:
        raise ValueError(f"{sources[0]}: give two folders or more to merge")
    models = [Dense(source, differs) for source in sources]
    for other in models[1:]:
        for name in models[0].shape | other.shape:
            one, two = models[0].shape.get(name), other.shape.get(name)
            if one != two:
                raise ValueError(
                    f"{other.config.path}: {name} = {two}, in {models[0].config.path} it is {one}: "
                    "only models of one shape are merged"
                )
    first = 0
    if attention != "average":
        if attention not in map(str, range(1, len(models) + 1)):
            raise ValueError(
                f"--attention {attention} must be average or a number from 1 to {len(models)}"
            )
        first = int(attention) - 1
    recipe = merged(models[0].shape, len(models), topk, seed)
    models = models[first:] + models[:first]
    facts = {"attention": attention, "models": [str(one.config.path.parent) for one in models]}
    return _make(recipe, models, out, step, mone, seed, facts, average=attention == "average")


def _make(
    recipe: Recipe, models: Sequence[Dense], out: Path, step: Step, mone: str | None, seed: int,
    facts: dict[str, Any], average: bool = False,
) -> list[str]:  # fmt: skip
    first = models[0]
    shape = recipe.shape(first.shape, mone)
    facts = {
        "made_by": recipe.name, "experts": recipe.experts, "topk": recipe.topk,
        "neurons_of_an_expert": recipe.width, "seed": seed, **facts,
    }  # fmt: skip
    weights = MadeWeights([one.weights for one in models], first.shape, recipe, average)
    prints = " ".join(fingerprint(one.weights) for one in models)
    header = f"A {first.family.name} model with experts made of its FFNs (convert {recipe.name})."
    origin = Origin(
        weights, as_experts(first.family), words_of_shape(shape, first.config.path),
        shape_file(shape, header, *first.config.notes, *first.config.left()),
        f"{json.dumps(facts, sort_keys=True)} {mone} {prints}", first.config.path.parent,
        is_copy=False,
    )  # fmt: skip
    return write_checkpoint(origin, out, step, {SUMMARY: json.dumps(facts, indent=1).encode()})
