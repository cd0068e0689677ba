"""Laws of loss over a ladder of sizes, of MoNE and of the dense MoE of equal total.

A preset's model is made narrower and wider, with experts of as many neurons a width, and reads
tokens in proportion to its parameters; learning rate and spread of the first weights go by
1 / sqrt(H), from the width of the preset, which the other studies have. The dense MoE of a size has
as many parameters, reads as much and takes more operations: the law of parameters compares at equal
total, the law of operations at equal compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from megatron_mone.studies import laws
from megatron_mone.studies.catalogue import large, small
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import compared
from megatron_mone.studies.laws import Band, Law
from megatron_mone.studies.page import interval
from megatron_mone.studies.study import Cell, Preset, Section, Study, Trained, Values
from megatron_mone.studies.tasks import Found

KINDS = ("MoNE", "dense MoE")
VOCABULARY = 1024
SIZES = {"0.9B": 0.925e9, "2.8B": 2.81e9, "7B": 7e9}
"""Parameters of models that nobody trains here."""
PARAMETERS, OPERATIONS = "parameters", "operations"
_SHARES = (1 / 2, 5 / 8, 3 / 4, 1, 5 / 4, 3 / 2)
"""Of the preset's width."""
_FINE = 32  # neurons of an expert are a multiple
_ROUND = 12  # steps are a multiple, as the trainer's windows and evaluations are
_OF_STEPS = ("train_iters", "lr_warmup_iters", "eval_interval", "log_interval", "save_interval")
_COLOURS = dict(zip(KINDS, ("#D55E00", "#0072B2"), strict=True))


def name_of(kind: str, width: int) -> str:
    """The name of a cell."""
    return f"{kind}, H = {width}"


def pair(width: int) -> tuple[str, str]:
    """The names of a size's two cells."""
    return name_of(KINDS[0], width), name_of(KINDS[1], width)


def widths(values: Values) -> list[int]:
    """Of the ladder."""
    return [round(share * values["hidden_size"]) for share in _SHARES]


def parameters(values: Values) -> int:
    """Of a model of either kind: attention, experts, router and norms of each layer, the last norm,
    and the two embeddings."""
    width, heads, experts = (
        values[name] for name in ("hidden_size", "num_attention_heads", "num_experts")
    )
    attention = 4 * width * heads * values.get("kv_channels", width // heads)
    layer = attention + 3 * experts * width * values["moe_ffn_hidden_size"]
    layer += experts * width + 2 * width
    vocabulary = large.VOCABULARY if "bf16" in values else VOCABULARY
    return values["num_layers"] * layer + width + 2 * vocabulary * width


def sized(width: int, values: Values) -> dict[str, Any]:
    """What a width changes of a preset's arguments."""
    share, slower = width / values["hidden_size"], (values["hidden_size"] / width) ** 0.5
    neurons = _FINE * round(share * values["moe_ffn_hidden_size"] / _FINE)
    wanted = {
        "hidden_size": width, "ffn_hidden_size": neurons, "moe_ffn_hidden_size": neurons,
        **{name: slower * values[name] for name in ("lr", "min_lr", "init_method_std")},
    }  # fmt: skip
    if "kv_channels" in values:  # heads of one size; of a model without, as many heads
        wanted["num_attention_heads"] = round(share * values["num_attention_heads"])
    longer = parameters({**values, **wanted}) / parameters(values)
    steps = whole = values["train_iters"]
    if longer != 1:
        steps = max(small.TINY_STEPS, _ROUND * round(longer * whole / _ROUND))
    wanted |= {name: max(1, values[name] * steps // whole) for name in _OF_STEPS}
    return {name: value for name, value in wanted.items() if value != values.get(name)}


def cells(values: Values) -> Sequence[Cell]:
    """Two cells a size."""
    sizes = {width: sized(width, values) for width in widths(values)}
    return [
        Cell(name_of(kind, width), f"{parameters({**values, **size}):,} parameters, {words}",
             {**size, **changes})
        for width, size in sizes.items()
        for kind, words, changes in (
            (KINDS[0], "r = 1/4", {}),
            (KINDS[1], "every neuron of the same experts", dict.fromkeys(small.MONE)),
        )
    ]  # fmt: skip


def read(run: Trained, preset: Preset) -> Sequence[Found]:
    """Its parameters."""
    return [(PARAMETERS, [0], [parameters({**preset.values, **run.cell.values})])]


@dataclass(frozen=True)
class Ladder:
    """The sizes whose two kinds were trained, and the laws of both.

    Attributes:
        of: what x is: parameters, or operations of a whole run.
        points: kind -> x and losses of each size.
        law: kind -> the law of all sizes.
        again: kind -> laws of resamples, drawn alike for both kinds.
    """

    of: str
    points: dict[str, laws.Points]
    law: dict[str, Law]
    again: dict[str, list[Law]]

    @property
    def largest(self) -> float:
        """The largest x of both kinds."""
        return max(x for points in self.points.values() for x, _ in points)

    def at(self, kind: str, x: float) -> Band:
        """Nats a token of a kind at x."""
        return laws.band(self.law[kind].at(x), [law.at(x) for law in self.again[kind]])

    def over(self, x: float) -> Band:
        """Nats a token of MoNE over the dense MoE at x."""
        pairs = zip(*(self.again[kind] for kind in KINDS), strict=True)
        value = self.law[KINDS[0]].at(x) - self.law[KINDS[1]].at(x)
        return laws.band(value, [one.at(x) - other.at(x) for one, other in pairs])

    def times(self, x: float) -> Band:
        """How many times MoNE's x the dense MoE needs for what MoNE has at x."""
        pairs = zip(*(self.again[kind] for kind in KINDS), strict=True)
        value = self.law[KINDS[1]].reaches(self.law[KINDS[0]].at(x)) / x
        return laws.band(value, [other.reaches(one.at(x)) / x for one, other in pairs])


def ladder(results: StudyResults, of: str, without_largest: bool = False) -> Ladder | None:
    """The laws of parameters or of operations; None of too few sizes.

    Args:
        results: of the study.
        of: "parameters" or "operations".
        without_largest: whether the largest size is left out.
    """
    widths = _widths(results)[: -1 if without_largest else None]
    if len(widths) < laws.LEAST:
        return None
    points: dict[str, laws.Points] = {
        kind: [(_x(results, kind, width, of), results.cell(name_of(kind, width)).losses())
               for width in widths]
        for kind in KINDS
    }  # fmt: skip
    seeds = sorted(set.intersection(*(
        {*losses} for one in points.values() for _, losses in one
    )))  # fmt: skip
    resamples = laws.draws(len(widths), seeds)
    return Ladder(
        of, points, {kind: laws.fitted(one) for kind, one in points.items()},
        {kind: laws.fitted_again(one, resamples) for kind, one in points.items()},
    )  # fmt: skip


def _widths(results: StudyResults) -> list[int]:
    named = {int(cell.name.rpartition(" ")[2]) for cell in results.cells}
    return [one for one in sorted(named) if results.has(*pair(one))]


def _x(results: StudyResults, kind: str, width: int, of: str) -> float:
    name = name_of(kind, width)
    if of == PARAMETERS:
        return results.curve(PARAMETERS, name)[0][1].mean
    run = results.cell(name).runs[0]
    return run.steps * run.active_flops_per_step


def findings(results: StudyResults) -> list[str]:
    """Each size, then what the laws say, first where they can be checked."""
    found = [compared(results, *pair(width)) for width in _widths(results)]
    by_size, by_operations = (ladder(results, of) for of in (PARAMETERS, OPERATIONS))
    if by_size is None or by_operations is None:
        return [*found, f"No law: it takes {laws.LEAST} sizes of both kinds."]
    found += _checked(results)
    top, over, times = at_equal_operations(by_operations)
    found.append(
        f"At {top:.2g} operations of a whole run, within the ladder, the laws put MoNE at "
        f"{over.text('+.4f')} nats a token over the dense MoE; the dense MoE takes "
        f"{times.text('.2f')} times the operations to MoNE's loss."
    )
    for words, size in SIZES.items():
        both = " and ".join(f"{kind} at {by_size.at(kind, size).text('.2f')}" for kind in KINDS)
        found.append(
            f"At {words} parameters, {size / by_size.largest:,.0f} times the largest model here, "
            f"the laws put {both}, the difference at {by_size.over(size).text('+.2f')} nats a "
            "token: the band is what the fit leaves open, not what a law's form does."
        )
    return found


def at_equal_operations(by_operations: Ladder) -> tuple[float, Band, Band]:
    """The operations of the largest MoNE; there, nats a token of MoNE over the dense MoE, and how
    many times the operations the dense MoE takes to MoNE's loss."""
    top = max(x for x, _ in by_operations.points[KINDS[0]])
    return top, by_operations.over(top), by_operations.times(top)


def _checked(results: StudyResults) -> list[str]:
    """What the laws without the largest size say of it, and what it was."""
    shorter = ladder(results, PARAMETERS, without_largest=True)
    if shorter is None:
        return []
    width, said = _widths(results)[-1], []
    for kind in KINDS:
        told = shorter.at(kind, _x(results, kind, width, PARAMETERS))
        measured = results.cell(name_of(kind, width)).loss
        word = "holds" if told.low <= measured.mean <= told.high else "does not hold"
        said.append(
            f"Fitted without H = {width}, the law of {kind} puts it at {told.text('.4f')}; its "
            f"mean is {interval(measured, '.4f')}: the band {word} it."
        )
    return said


def sections(results: StudyResults) -> Sequence[Section]:
    """The ladder, its laws, and what they say far away."""
    found = [Section("The ladder", [
        "Tokens are in proportion to parameters, as nearly as a multiple of 12 steps lets."
    ], table=(
        ("H", "parameters", "steps", "tokens a parameter",
         *(f"{kind}: operations" for kind in KINDS), *(f"{kind}: loss" for kind in KINDS),
         "difference"),
        [_row(results, width) for width in _widths(results)],
    ))]  # fmt: skip
    both = [ladder(results, of) for of in (PARAMETERS, OPERATIONS)]
    ladders = [one for one in both if one is not None]
    if not ladders:
        return found
    by_size = ladders[0]
    return [
        *found,
        Section("The laws", [
            "L = E + A x^-a by least squares of the means over seeds, x parameters (at equal total "
            "and equal tokens) or operations of a whole run (at equal compute). Bands are the "
            f"middle 95% of {laws.DRAWS:,} resamples of sizes and of the seeds of each."
        ], figure=(partial(_laws, ladders), "Means of seeds, laws and their bands."),
            table=(("of", "kind", "E, nats a token", "A", "a"),
                   [_law_row(one, kind) for one in ladders for kind in KINDS])),
        Section("How little they say at size", [
            "The law of parameters, continued past the largest model by a factor of up to "
            f"{max(SIZES.values()) / by_size.largest:,.0f}. The bands suppose that a power law "
            "with a floor still holds there, which nothing here shows."
        ], figure=(partial(_far, by_size), "The laws of parameters, continued."),
            table=(("parameters", *KINDS, "difference", "width of its band"),
                   [_far_row(by_size, *one) for one in SIZES.items()])),
    ]  # fmt: skip


def _row(results: StudyResults, width: int) -> list[str]:
    names = pair(width)
    run, size = results.cell(names[0]).runs[0], _x(results, KINDS[0], width, PARAMETERS)
    return [
        f"{width}", f"{size:,.0f}", f"{run.steps:,}",
        f"{run.steps * run.tokens_per_step / size:.2f}",
        *(f"{_x(results, kind, width, 'operations'):.3g}" for kind in KINDS),
        *(interval(results.cell(name).loss, ".4f") for name in names),
        interval(results.difference(*names), "+.4f"),
    ]  # fmt: skip


def _law_row(one: Ladder, kind: str) -> list[str]:
    law, again = one.law[kind], one.again[kind]
    return [
        one.of, kind, laws.band(law.floor, [each.floor for each in again]).text(".2f"),
        laws.band(law.factor, [each.factor for each in again]).text(".3g"),
        laws.band(law.exponent, [each.exponent for each in again]).text(".3f"),
    ]  # fmt: skip


def _far_row(by_size: Ladder, words: str, size: float) -> list[str]:
    over = by_size.over(size)
    return [
        words, *(by_size.at(kind, size).text(".2f") for kind in KINDS), over.text("+.2f"),
        f"{over.high - over.low:.2f}",
    ]  # fmt: skip


def _laws(ladders: Sequence[Ladder]) -> Figure:
    figure, panels = plt.subplots(1, len(ladders), figsize=(9, 4), sharey=True)
    for axes, one in zip(panels, ladders, strict=True):
        low = min(x for points in one.points.values() for x, _ in points)
        _lines(axes, one, low, one.largest)
        axes.set_xlabel(one.of if one.of == PARAMETERS else "active operations of a run")
    panels[0].set_ylabel("validation loss, nats a token")
    figure.tight_layout()
    return figure


def _far(by_size: Ladder) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4))
    low = min(x for points in by_size.points.values() for x, _ in points)
    _lines(axes, by_size, low, max(SIZES.values()))
    for words, size in SIZES.items():
        axes.axvline(size, color="#999999", linewidth=0.8)
        axes.text(size, axes.get_ylim()[1], words, fontsize=8, ha="right", va="top", rotation=90)
    axes.set_xlabel(PARAMETERS)
    axes.set_ylabel("loss, nats a token")
    figure.tight_layout()
    return figure


def _lines(axes: Any, one: Ladder, low: float, high: float) -> None:
    """Points, law and band of both kinds from low to high."""
    at = [low * (high / low) ** (n / 40) for n in range(41)]
    for kind in KINDS:
        colour, bands = _COLOURS[kind], [one.at(kind, x) for x in at]
        axes.plot(at, [each.value for each in bands], color=colour, label=kind)
        axes.fill_between(at, [each.low for each in bands], [each.high for each in bands],
                          color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        for x, losses in one.points[kind]:
            axes.plot([x] * len(losses), [*losses.values()], ".", color=colour, markersize=5)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8)


STUDY = Study(
    name="scale",
    question="How do the losses of MoNE and of the dense MoE fall with size, and what does that "
    "say of sizes at which they are used?",
    presets={
        "tiny": Preset(
            small.training(small.TINY_STEPS), seeds=2,
            only=pair(widths(small.MODEL)[0]), reference=pair(widths(small.MODEL)[0])[1],
        ),
        "cpu": Preset(small.training(small.CPU_STEPS)),
        **{
            name: replace(
                large.PRESETS[name],
                reference=pair(large.PRESETS[name].values["hidden_size"])[1],
            )
            for name in ("1gpu", "cluster")
        },
    },
    cells=cells,
    reference=pair(small.MODEL["hidden_size"])[1],
    findings=findings,
    limits=(
        "Models of 2 layers, under 3 million parameters and half a token a parameter: laws of "
        "published models are of twenty tokens a parameter and more.",
        "Width grows, depth and the number of experts do not.",
        "The text is one author's in 1,024 tokens: its floor is not that of other text, and there "
        "is far less of it than the larger sizes would read.",
        "The dense MoE has equal total and equal tokens, so it takes more operations; one of equal "
        "active was not trained for the ladder, which the law of operations stands in for.",
        "Learning rate and first weights by 1 / sqrt(H), not tuned at any size.",
    ),
    read=read,
    sections=sections,
)  # fmt: skip
