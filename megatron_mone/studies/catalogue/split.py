"""Few experts with many neurons each, or many with few, at equal operations and equal total.

A token's experts take 2 H K_E (F + 8 K_N) operations forward and backward, every gate dense, up,
down and all gradients of the kept neurons; a layer holds E F neurons. A dense expert is one that
keeps all its F. Shapes: K_E of E experts chosen for a token, K_N of F neurons kept in each.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from megatron_mone.studies.catalogue import large, small
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import compared
from megatron_mone.studies.page import interval
from megatron_mone.studies.statistics import best_shares
from megatron_mone.studies.study import Cell, Preset, Section, Study, Values

_NEAR = 0.1  # of a budget: operations that are told to be its
_DENSE_MOE = dict.fromkeys(small.MONE)


@dataclass(frozen=True)
class Split:
    """How a layer's neurons are divided and chosen.

    Attributes:
        chosen: K_E, experts of a token.
        experts: E.
        kept: K_N, neurons of a chosen expert; F of a dense one.
        width: F.
    """

    chosen: int
    experts: int
    kept: int
    width: int

    @property
    def name(self) -> str:
        """Of its cell."""
        return f"{self.chosen} of {self.experts} x {self.kept} of {self.width}"

    @classmethod
    def named(cls, name: str) -> Self:
        """The split of a cell."""
        return cls(*map(int, re.findall(r"\d+", name)))

    @property
    def operations(self) -> int:
        """K_E (F + 8 K_N): of a token in a layer's experts, by 2 H."""
        return self.chosen * (self.width + 8 * self.kept)

    @property
    def dense(self) -> bool:
        """Whether every neuron of a chosen expert is kept."""
        return self.kept == self.width

    def values(self) -> dict[str, Any]:
        """Megatron's arguments. One expert alone has no others to be normalised over: its weight
        is its share of the softmax over all, as Megatron demands."""
        single = {"moe_router_pre_softmax": True} if self.chosen == 1 else {}
        kept = _DENSE_MOE if self.dense else {"mone_neuron_ratio": self.kept / self.width}
        return {
            "num_experts": self.experts, "moe_router_topk": self.chosen,
            "moe_ffn_hidden_size": self.width, **single, **kept,
        }  # fmt: skip


MAIN = Split(small.TOPK, small.EXPERTS, small.WIDTH // 4, small.WIDTH)
BUDGETS = {
    MAIN.operations: (
        Split(1, 4, 128, 512), Split(2, 4, 32, 512),
        Split(1, 8, 160, 256), MAIN, Split(3, 8, 32, 256), Split(4, 8, 16, 256),
        Split(2, 16, 80, 128), Split(4, 16, 32, 128), Split(8, 16, 8, 128),
        Split(3, 36, 57, 57),
    ),
    MAIN.operations // 2: (
        Split(1, 4, 32, 512),
        Split(1, 8, 64, 256), Split(2, 8, 16, 256),
        Split(2, 16, 32, 128), Split(4, 16, 8, 128),
        Split(2, 48, 43, 43),
    ),
}  # fmt: skip
"""Operations of the experts of a token, by 2 H -> splits that take them; the last is dense. Those
of the model for CPU cores, of all that whole numbers leave."""


def main_split(values: Values) -> Split:
    """That of a preset's model."""
    width = values["moe_ffn_hidden_size"]
    return Split(values["moe_router_topk"], values["num_experts"],
                 round(values["mone_neuron_ratio"] * width), width)  # fmt: skip


def budgets(values: Values) -> dict[int, tuple[Split, ...]]:
    """Operations -> splits, of a preset. Of a larger model than that for CPU cores: half as many
    experts, as many and twice as many, of powers of two chosen, then dense ones as many chosen."""
    main = main_split(values)
    if main == MAIN:
        return BUDGETS
    found = []
    for experts in (main.experts // 2, main.experts, 2 * main.experts):
        width = main.experts * main.width // experts
        for chosen in (2**n for n in range(experts.bit_length() - 1)):
            kept, rest = divmod(main.operations // chosen - width, 8)
            if not rest and width // 16 <= kept < width:
                found.append(Split(chosen, experts, kept, width))
    width = 8 * round(main.operations / (9 * main.chosen) / 8)
    experts = round(main.experts * main.width / width)
    return {main.operations: (*found, Split(main.chosen, experts, width, width))}


def cells(values: Values) -> Sequence[Cell]:
    """A cell a split, budget by budget."""
    return [
        Cell(one.name, f"{one.chosen} experts of {one.experts}, "
             + ("dense, " if one.dense else f"{one.kept} neurons of {one.width} in each, ")
             + f"K_E (F + 8 K_N) = {one.operations:,}", one.values())
        for splits in budgets(values).values()
        for one in splits
    ]  # fmt: skip


def _trained(results: StudyResults) -> dict[int, list[Split]]:
    """Budget -> its splits that were trained; budgets are far apart, dense ones near theirs."""
    found: dict[int, list[Split]] = {}
    splits = [Split.named(cell.name) for cell in results.cells]
    for one in sorted(splits, key=lambda one: one.dense):
        near = [budget for budget in found if abs(one.operations / budget - 1) < _NEAR]
        found.setdefault(near[0] if near else one.operations, []).append(one)
    return found


def _shares(results: StudyResults, splits: Sequence[Split]) -> dict[str, float]:
    return best_shares({one.name: results.cell(one.name).losses() for one in splits})


def findings(results: StudyResults) -> list[str]:
    """The best split of each budget and which others cannot be told from it; then dense experts of
    equal operations and equal total against it."""
    found = []
    for budget, splits in _trained(results).items():
        best = min(splits, key=lambda one: results.cell(one.name).loss.mean)
        share = _shares(results, splits)[best.name]
        others = [one.name for one in splits if one is not best]
        clear = [one for one in others if results.difference(one, best.name).is_clear]
        close = [one for one in others if one not in clear]
        seeds = len(results.cell(best.name).runs)
        found.append(
            f"At {budget:,} the lowest mean loss is that of {best.name}, "
            f"{interval(results.cell(best.name).loss, '.4f')} nats a token; it is the best of "
            f"{share:.0%} of resamples of {seeds} {'seed' if seeds == 1 else 'seeds'}. Told apart "
            f"from it: {'; '.join(clear) or 'none'}. Not told apart: {'; '.join(close) or 'none'}."
        )
        dense = [one for one in splits if one.dense]
        found += [compared(results, one.name, dense[0].name)
                  for one in splits if dense and not one.dense]  # fmt: skip
    return found


def sections(results: StudyResults) -> Sequence[Section]:
    """The splits as a surface, and side by side at equal operations."""
    found = _trained(results)
    total = Split.named(results.reference)
    return [
        Section(
            "The surface", [
                "Every split of a panel takes the same operations, as nearly as whole numbers let: "
                "right is more experts of a token, up is more neurons of each. A cross is a split "
                "whose experts are dense."
            ],
            figure=(lambda: _surface(results, found), "Loss by split, mean of seeds."),
        ),
        Section(
            "Equal operations, equal total", [
                f"A layer has {total.experts * total.width:,} neurons, as nearly as whole numbers "
                "let. GFLOP are of a step of the whole model but its routers, which take 6 H "
                "operations a token and H parameters for each expert. Best of: the share of "
                "resamples of the seeds in which the split has its budget's lowest mean loss."
            ],
            table=(
                ("split", "K_E (F + 8 K_N)", "E F", "active GFLOP", "loss",
                 "over dense experts", "best of"),
                [row for splits in found.values() for row in _rows(results, splits)],
            ),
        ),
    ]  # fmt: skip


def _rows(results: StudyResults, splits: Sequence[Split]) -> list[list[str]]:
    shares = _shares(results, splits)
    dense = next((one.name for one in splits if one.dense), None)
    return [
        [
            one.name, f"{one.operations:,}", f"{one.experts * one.width:,}",
            f"{results.cell(one.name).runs[0].active_flops_per_step / 1e9:.3f}",
            interval(results.cell(one.name).loss, ".4f"),
            "" if dense in (None, one.name)
            else interval(results.difference(one.name, dense), "+.4f"),
            f"{shares[one.name]:.0%}",
        ]
        for one in splits
    ]  # fmt: skip


def _surface(results: StudyResults, found: dict[int, list[Split]]) -> Figure:
    figure, panels = plt.subplots(1, len(found), figsize=(9, 4.2), squeeze=False, sharey=True)
    losses = [results.cell(one.name).loss.mean for splits in found.values() for one in splits]
    for axes, (budget, splits) in zip(panels[0], found.items(), strict=True):
        for dense, marker in ((False, "o"), (True, "X")):
            shown = [one for one in splits if one.dense is dense]
            points = axes.scatter(
                [one.chosen for one in shown], [one.kept for one in shown], marker=marker, s=80,
                c=[results.cell(one.name).loss.mean for one in shown], cmap="viridis_r",
                vmin=min(losses), vmax=max(losses), edgecolors="#333333", linewidths=0.5,
            )  # fmt: skip
        for one in splits:
            column = [other.kept for other in splits if other.chosen == one.chosen]
            below, above = one.kept == min(column), one.kept == max(column)
            words = f"E = {one.experts}\n{results.cell(one.name).loss.mean:.4f}"
            axes.annotate(words, (one.chosen, one.kept), fontsize=6, textcoords="offset points",
                          xytext=(6, -5 - 8 * below + 8 * above))  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlim(0.8, 16)
        axes.set_title(f"K_E (F + 8 K_N) = {budget:,}", fontsize=10)
        axes.set_xlabel("K_E, experts of a token")
    panels[0][0].set_ylabel("K_N, neurons of each")
    figure.colorbar(points, ax=list(panels[0]), label="validation loss, nats a token")
    return figure


STUDY = Study(
    name="split",
    question="At equal operations and equal total, are few experts with many neurons of each "
    "better than many experts with few, and than dense experts?",
    presets={
        "tiny": Preset(
            small.training(small.TINY_STEPS), seeds=2, only=(MAIN.name, Split(3, 36, 57, 57).name)
        ),
        "cpu": Preset(small.training(small.CPU_STEPS)),
        **{
            name: replace(preset, reference=main_split(preset.values).name)
            for name, preset in large.PRESETS.items()
        },
    },
    cells=cells,
    reference=MAIN.name,
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens: what holds here need not hold at size.",
        "Equal operations of forward and backward together; in forward alone splits differ, "
        "K_E (F + 2 K_N).",
        "Not equal time: smaller blocks of rows and more experts cost a machine more than their "
        "operations say.",
        "A split of one expert is weighted by its share of the softmax over all experts, the "
        "others by shares that add up to 1: the two differ in more than the split.",
        "The best of several splits was chosen by the same seeds that are shown for it: its loss "
        "is flattered a little.",
        "One learning rate for all cells, chosen for none of them.",
    ),
    sections=sections,
)
