"""Experts made of dense FFNs: the weights of an MoE folder that stands nowhere.

Every path from dense to experts is said in the same words: an expert is some neurons of one model's
FFN, and a router. Carving gives each expert neurons of its own, upcycling all or a slice of them,
merging those of a model each. Tensors are made when they are read, a layer's FFN in memory. May
touch: the folders, reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_mone.checkpoint.upcycling import random_router, upcycled_router
from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_folder import Stored, Weights
from megatron_mone.conversion.neuron_groups import random_split
from megatron_mone.conversion.pairs import EXPERTS, SHARED_EXPERTS
from megatron_mone.conversion.shape import Shape

_DENSE = "model.layers.{}.mlp.{}_proj.weight"
_MADE = re.compile(
    r"model\.layers\.(\d+)\.mlp\."
    r"(?:gate|shared_experts\.(\w+)_proj|experts\.(\d+)\.(\w+)_proj)\.weight"
)
_PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class LayerPlan:
    """Of what a layer's experts are made.

    Attributes:
        experts: of each (number of its model, its neurons [f]).
        router: [E, H] float32.
        shared: neurons of the first model that the shared expert has.
    """

    experts: Sequence[tuple[int, Tensor]]
    router: Tensor
    shared: Tensor


@dataclass(frozen=True)
class Recipe:
    """How a dense model's FFNs become experts.

    Attributes:
        name: carve, upcycle or merge.
        experts: E.
        topk: experts of a token.
        width: f, neurons of an expert.
        shared: neurons of the shared expert.
        scale: what the chosen experts' probabilities, which sum to 1, are multiplied by.
        plan: of a layer.
        redrawn: share of each expert's neurons that start anew.
        seed: of those.
    """

    name: str
    experts: int
    topk: int
    width: int
    plan: Callable[[int], LayerPlan]
    shared: int = 0
    scale: int = 1
    redrawn: float = 0.0
    seed: int = 1

    def shape(self, dense: Shape, mone: str | None) -> Shape:
        """The model's arguments.

        Args:
            dense: those of the dense model.
            mone: of configs/mone, if any.
        """
        found: Shape = {"num_experts": self.experts, "moe_ffn_hidden_size": self.width}
        if self.shared:
            found["moe_shared_expert_intermediate_size"] = self.shared
        found["moe_router_topk"] = self.topk
        if self.scale != 1:
            found["moe_router_topk_scaling_factor"] = float(self.scale)
        found |= {
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 1e-3,
        }
        return dense | found | ({"mone": mone} if mone else {})


def carved(
    dense: Shape, experts: int, topk: int, shared: int, seed: int,
    plans: Sequence[LayerPlan] | None = None,
) -> Recipe:  # fmt: skip
    """Each neuron in one expert, or in the shared one: the dense FFN itself where topk is experts.

    Args:
        dense: arguments of the dense model.
        experts: E.
        topk: experts of a token.
        shared: neurons of the shared expert.
        seed: of a random split.
        plans: of each layer, calibrated; a random split when None.

    Raises:
        ValueError: numbers that do not fit; one line.
    """
    neurons, hidden = dense["ffn_hidden_size"], dense["hidden_size"]
    _check_topk(experts, topk)
    if not 0 <= shared < neurons or (neurons - shared) % experts:
        fits = shared + (neurons - shared) % experts if 0 <= shared < neurons else neurons % experts
        raise ValueError(
            f"--shared-neurons {shared}: {neurons} neurons less those of the shared expert do not "
            f"divide by --experts {experts}; {fits} would fit"
        )

    def plan(layer: int) -> LayerPlan:
        if plans is not None:
            return plans[layer]
        groups, common = random_split(neurons, experts, shared, seed + layer)
        router = _router(experts, topk, hidden, seed + layer)
        return LayerPlan([(0, group) for group in groups], router, common)

    return Recipe(
        "carve", experts, topk, (neurons - shared) // experts, plan, shared=shared, scale=topk
    )


def _router(experts: int, topk: int, hidden: int, seed: int) -> Tensor:
    """One that tells no expert from another where all are chosen: each weighs 1 exactly."""
    return torch.zeros(experts, hidden) if topk == experts else random_router(experts, hidden, seed)


def upcycled(
    dense: Shape, experts: int, topk: int, granularity: int, redrawn: float, seed: int
) -> Recipe:
    """Copies of the FFN; each cut in `granularity` slices that are routed to together at first.

    The output is the dense model's to rounding, but for what is redrawn. Sources: Komatsuzaki et
    al. 2022 (sparse upcycling, arXiv 2212.05055); Nakamura et al. 2025 (Drop-Upcycling, arXiv
    2502.19261), for `redrawn`; He et al. 2024 (virtual groups, arXiv 2410.07524), for
    `granularity`.

    Args:
        dense: arguments of the dense model.
        experts: E, a multiple of `granularity`.
        topk: experts of a token, a multiple of `granularity`.
        granularity: slices of a copy; 1 is whole copies.
        redrawn: share of an expert's neurons that start anew, from the spread of the old.
        seed: of router and redrawn neurons.

    Raises:
        ValueError: numbers that do not fit; one line.
    """
    neurons, hidden = dense["ffn_hidden_size"], dense["hidden_size"]
    _check_topk(experts, topk)
    for name, value in (("--experts", experts), ("--topk", topk), ("FFN of", neurons)):
        if granularity < 1 or value % granularity:
            raise ValueError(f"--granularity {granularity} does not divide {name} {value}")
    if not 0 <= redrawn < 1:
        raise ValueError(f"--redraw {redrawn} must be a share from 0 to below 1")
    slices = torch.arange(neurons).view(granularity, -1)
    nothing = torch.empty(0, dtype=torch.long)

    def plan(layer: int) -> LayerPlan:
        router = upcycled_router(experts, granularity, hidden, seed, layer)
        return LayerPlan([(0, slices[e % granularity]) for e in range(experts)], router, nothing)

    return Recipe(
        "upcycle", experts, topk, neurons // granularity, plan, scale=granularity, redrawn=redrawn,
        seed=seed,
    )  # fmt: skip


def merged(dense: Shape, models: int, topk: int, seed: int) -> Recipe:
    """An expert for each of several dense models of one shape.

    Source: Sukhbaatar et al. 2024 (Branch-Train-MiX, arXiv 2403.07816).

    Args:
        dense: arguments of each model.
        models: how many.
        topk: experts of a token.
        seed: of the router.

    Raises:
        ValueError: numbers that do not fit; one line.
    """
    _check_topk(models, topk)
    everything = torch.arange(dense["ffn_hidden_size"])
    nothing = torch.empty(0, dtype=torch.long)

    def plan(layer: int) -> LayerPlan:
        router = random_router(models, dense["hidden_size"], seed + layer)
        return LayerPlan([(model, everything) for model in range(models)], router, nothing)

    return Recipe("merge", models, topk, len(everything), plan)


def _check_topk(experts: int, topk: int) -> None:
    if not 2 <= topk <= experts:
        raise ValueError(
            f"--topk {topk} must be from 2 to the {experts} experts: the weight of one alone is 1, "
            "whatever its router says"
        )


def as_experts(family: Family) -> Family:
    """The table of a dense family whose FFNs became experts."""
    pairs = (*family.pairs, *EXPERTS, *SHARED_EXPERTS)
    return replace(family, name=f"{family.name} with experts", pairs=pairs)


def _of_width(stored: Stored, width: int, projection: str) -> Stored:
    """A projection of so many neurons, of the dtype and file of all of them."""
    hidden = stored.shape[0] if projection == "down" else stored.shape[1]
    shape = (hidden, width) if projection == "down" else (width, hidden)
    return replace(stored, shape=shape, size=width * hidden * stored.dtype.itemsize)


class MadeWeights(Weights):
    """The tensors of the model that a recipe makes, read as those of a folder.

    Args:
        sources: dense models of one shape; the first is named in messages.
        dense: their arguments.
        recipe: how.
        average: of tensors that are no FFN's, the mean over all sources, not the first's.
    """

    def __init__(
        self, sources: Sequence[Weights], dense: Shape, recipe: Recipe, average: bool = False
    ) -> None:
        super().__init__(sources[0].folder)
        self._sources, self._recipe = sources, recipe
        self._dense, self._average = dense, average
        self._plan: tuple[int, LayerPlan] | None = None
        self._ffn: dict[tuple[int, str], Tensor] = {}
        self.tensors = self._made()  # type: ignore[misc]  # not of headers

    def read(self, name: str) -> Tensor:
        """One tensor, made now."""
        found = _MADE.fullmatch(name)
        if found is None:
            return self._beside(name)
        layer, dtype = int(found[1]), self.tensors[name].dtype
        plan = self._of_layer(layer)
        if found[2] is not None:
            return self._rows(layer, 0, found[2], plan.shared)
        if found[3] is None:
            return plan.router.to(dtype)
        expert = int(found[3])
        source, neurons = plan.experts[expert]
        rows = self._rows(layer, source, found[4], neurons)
        return self._redraw(rows, layer, expert, found[4])

    def _made(self) -> dict[str, Stored]:
        """Name -> dtype, shape and file of what it is made of."""
        there = dict(self._sources[0].tensors)
        recipe, hidden = self._recipe, self._dense["hidden_size"]
        for layer in range(self._dense["num_layers"]):
            at = f"model.layers.{layer}.mlp."
            for projection in _PROJECTIONS:
                stored = self._dense_part(layer, projection)
                del there[_DENSE.format(layer, projection)]
                expert = _of_width(stored, recipe.width, projection)
                for e in range(recipe.experts):
                    there[f"{at}experts.{e}.{projection}_proj.weight"] = expert
                if recipe.shared:
                    shared = _of_width(stored, recipe.shared, projection)
                    there[f"{at}shared_experts.{projection}_proj.weight"] = shared
            size = recipe.experts * hidden * stored.dtype.itemsize
            router = replace(stored, shape=(recipe.experts, hidden), size=size)
            there[f"{at}gate.weight"] = router
        return there

    def _dense_part(self, layer: int, projection: str) -> Stored:
        """Of the first source. Raises ValueError where one has not this tensor, in this shape."""
        name = _DENSE.format(layer, projection)
        wanted = self._dense["ffn_hidden_size"], self._dense["hidden_size"]
        if projection == "down":
            wanted = wanted[::-1]
        for source in self._sources:
            stored = source.tensors.get(name)
            if stored is None:
                raise ValueError(f"{source.folder}: tensor {name} is missing")
            if stored.shape != wanted:
                raise ValueError(
                    f"{stored.path}: {name} is {list(stored.shape)}, by its config.json it is "
                    f"{list(wanted)}"
                )
        return self._sources[0].tensors[name]

    def _beside(self, name: str) -> Tensor:
        """A tensor that is no FFN's."""
        if not self._average:
            return self._sources[0].read(name)
        total: Any = 0.0
        for source in self._sources:
            if name not in source.tensors:
                raise ValueError(f"{source.folder}: tensor {name} is missing")
            total = total + source.read(name).double()
        return (total / len(self._sources)).to(self.tensors[name].dtype)

    def _of_layer(self, layer: int) -> LayerPlan:
        if self._plan is None or self._plan[0] != layer:
            self._plan, self._ffn = (layer, self._recipe.plan(layer)), {}
        return self._plan[1]

    def _rows(self, layer: int, source: int, projection: str, neurons: Tensor) -> Tensor:
        key = (source, projection)
        if key not in self._ffn:
            if len(self._ffn) >= len(_PROJECTIONS):
                self._ffn.clear()
            self._ffn[key] = self._sources[source].read(_DENSE.format(layer, projection))
        whole = self._ffn[key]
        return whole[:, neurons] if projection == "down" else whole[neurons]

    def _redraw(self, rows: Tensor, layer: int, expert: int, projection: str) -> Tensor:
        """Some neurons anew, the same of all three projections, with the mean and spread of all."""
        recipe = self._recipe
        fresh = round(recipe.redrawn * recipe.width)
        if not fresh:
            return rows
        place = (recipe.seed * 1_000_003 + layer) * 1_000_003 + expert
        neurons = torch.randperm(recipe.width, generator=torch.Generator().manual_seed(place))
        generator = torch.Generator().manual_seed(place + 1 + _PROJECTIONS.index(projection))
        out = rows.t().clone() if projection == "down" else rows.clone()
        values = out.float()
        drawn = torch.randn(fresh, out.shape[1], generator=generator)
        out[neurons[:fresh]] = (drawn * values.std() + values.mean()).to(out.dtype)
        return out.t() if projection == "down" else out
