"""How few activated neurons a trained model needs: measured, without training at fewer.

Of the dense MoE and of MoNE at r = 1/4, the runs of the study `ratio`, and of any model with gated
FFNs that is given.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_mone.common.files import read_text
from megatron_mone.common.machine import version
from megatron_mone.studies.catalogue import activation, ratio, small
from megatron_mone.studies.curves import line
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import nats
from megatron_mone.studies.measuring.sparsity_names import (
    CHANCE,
    CRITERIA,
    GATE,
    LAYER_SHARES,
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
    USED,
    parts_of,
)
from megatron_mone.studies.quality_by_share import (
    Samples,
    added,
    as_it_is,
    between,
    first,
    has_signal,
    keeps_answers,
    keeps_loss,
    right_as_it_is,
    samples,
)
from megatron_mone.studies.statistics import Estimate, estimate
from megatron_mone.studies.study import Cell, Preset, Section, Study, Trained, Values
from megatron_mone.studies.tasks import Task

DENSE = activation.dense(activation.GATES[0])
_CLAIM = (0.4, 0.1)
"""Kept where 60% and 90% are dropped, of what the model keeps as it is."""
_LOST = (0.01, 0.05)
"""What may be lost, of the loss or of right answers, where 99% or 95% of quality are kept."""


def cells(values: Values) -> Sequence[Cell]:
    """One of the study `ratio`, and the dense MoE of `activation`, which can be exported."""
    wanted = (DENSE, ratio.mone(ratio.MAIN))
    found = (*activation.cells(values), *ratio.cells(values))
    return [cell for cell in found if cell.name in wanted]


def tasks(runs: Sequence[Trained], models: Mapping[str, Path], preset: Preset) -> list[Task]:
    """Of a given model a task a part; of a run, which is small, all parts in one."""
    text = preset.measuring["text"]
    words = read_text(Path(text), "--text") if text else ""
    seen: dict[str, Any] = {"text": hashlib.sha256(words.encode()).hexdigest()}
    answers = bool(version("lm-eval") and version("accelerate"))
    parts = [
        Task(name, 0, "neuron_needs:of_model", {
            **preset.measuring, "folder": str(folder), "part": part,
            "seen": {**seen, "files": _state(folder)},
        })
        for name, folder in models.items() for part in parts_of(answers)
    ]  # fmt: skip
    return parts + [
        Task(one.cell.name, one.seed, "neuron_needs:of_run", {
            **preset.measuring, "run": str(one.folder), "answers": answers, "seen": seen,
        })
        for one in runs
    ]  # fmt: skip


def _state(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a folder's files: another model there is measured anew."""
    facts = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [[name, fact.st_size, fact.st_mtime_ns] for name, fact in facts]


def findings(results: StudyResults) -> list[str]:
    """The published claim of each model, and the criterion that needs the fewest neurons."""
    return [
        said for who in results.who(OWN) for said in (_claim(results, who), _best(results, who))
    ]


def dropped(results: StudyResults, who: str) -> list[Estimate]:
    """Nats a token that a model loses without 60%, and 90%, of the neurons that it keeps."""
    own, base = first(results, OWN, who), as_it_is(results, who)
    values = samples(results, LOSS.format(GATE), who)
    return [added(between(values, own * share), base) for share in _CLAIM]


def _claim(results: StudyResults, who: str) -> str:
    own, level = first(results, OWN, who), estimate(as_it_is(results, who)).mean
    free, last = dropped(results, who)
    holds = [one.mean <= lost * level for one, lost in zip((free, last), _LOST, strict=True)]
    kept = "" if own == 1 else f" of the {own:.0%} that it keeps"
    return (
        f"{who}: without the 60%{kept} with the smallest |gate| it loses {nats(free)} "
        f"({free.mean / level:.1%} of its loss), without 90% {nats(last)} "
        f"({last.mean / level:.1%}). That 60% can be dropped at no cost (within 1% of the loss) "
        f"{_holds(holds[0])}; that quality falls only past 90% (by more than 5%) "
        f"{_holds(holds[1])}."
    )


def _holds(holds: bool) -> str:
    return "holds here" if holds else "does not hold here"


def _best(results: StudyResults, who: str) -> str:
    needed = {one: keeps_loss(results, who, one, _LOST[0]) for one in CRITERIA}
    known = {one: found.mean for one, found in needed.items() if found is not None}
    if not known:
        return f"{who}: no share by any criterion keeps its loss within 1%."
    said = ", ".join(
        f"{one} {share:.0%}" for one, share in sorted(known.items(), key=lambda x: x[1])
    )
    none = [one for one in CRITERIA if one not in known]
    left = f"; {', '.join(none)} at no share" if none else ""
    return f"{who}: its loss stays within 1% with this share of neurons, by {said}{left}."


def sections(results: StudyResults) -> list[Section]:
    """Losses, layers, answers, distributions, and the shares that keep quality."""
    who = results.who(OWN)
    if not who:
        return []
    found = [_losses(results, who), _needed(results, who), _layers(results, who)]
    answered = results.who(CHANCE)
    missing = Section("Right answers", ["Not measured: lm-eval or accelerate is not installed."])
    return [
        *found,
        _answers(results, answered) if answered else missing,
        _distributions(results, who),
    ]


def _panels(who: Sequence[str], draw: Callable[[Axes, str], None]) -> Figure:
    """A panel a model, two in a row."""
    rows = (len(who) + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(9, 3.2 * rows), squeeze=False)
    for axes in grid.flat[len(who) :]:
        axes.set_visible(False)
    for axes, one in zip(grid.flat, who, strict=False):
        draw(axes, one)
        axes.set_title(one, fontsize=9)
    grid.flat[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure


def _by_share(axes: Axes, y: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks([1, 0.5, 0.2, 0.1, 0.05, 0.02], ["100%", "50", "20", "10", "5", "2%"])
    axes.minorticks_off()
    axes.set_xlabel("share of neurons kept")
    axes.set_ylabel(y)


def _curve(values: Samples, base: Sequence[float]) -> list[tuple[float, Estimate]]:
    return [(share, added(listed, base)) for share, listed in values.items()]


def _losses(results: StudyResults, who: Sequence[str]) -> Section:
    def draw(axes: Axes, one: str) -> None:
        base = as_it_is(results, one)
        for name in CRITERIA:
            line(axes, _curve(samples(results, LOSS.format(name), one), base), name)
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=0.1)
        _by_share(axes, "nats over as it is")

    rows = []
    for one in who:
        base = as_it_is(results, one)
        for name in CRITERIA:
            curve = dict(_curve(samples(results, LOSS.format(name), one), base))
            rows.append([one, name, *(_starred(curve[share]) for share in SHARES)])
        rows.append([one, "as it is", f"{estimate(base).mean:.4f}", *("" for _ in SHARES[1:])])
    blocks = {
        one: len(next(iter(results.measured(LOSS.format(GATE), one).values())).x) for one in who
    }
    sizes = [
        f"{one} {blocks[one] // len(samples(results, LOSS.format(GATE), one))} blocks of "
        f"{first(results, LENGTH, one):.0f} tokens"
        for one in who
    ]
    return Section(
        "Loss by share of neurons kept",
        ["Of each row's neurons (of an expert's, for the tokens that are routed to it) the share "
         "with the largest scores is kept, in all layers at once; of a MoNE model in the experts "
         "that choose, whose shared experts stay whole. Nats a token over the model as it is, "
         "paired; a * marks an interval of 95% without 0.",
         f"Text: {'; '.join(sizes)}. Intervals are over seeds where a cell was trained several "
         "times; of a given model over blocks of text, and say nothing of another training.",
         *(f"{name}: {meaning}." for name, meaning in CRITERIA.items())],
        (lambda: _panels(who, draw), "Nats a token over the model as it is; linear below 0.1."),
        (("model", "by", *(f"{share:.0%}" for share in SHARES)), rows),
    )  # fmt: skip


def _starred(found: Estimate) -> str:
    clear = found.half_width is not None and found.half_width > 0 and found.is_clear
    return f"{found.mean:+.3f}{'*' if clear else ''}"


def _needed(results: StudyResults, who: Sequence[str]) -> Section:
    rows = []
    for one in who:
        asked = bool(right_as_it_is(results, one)) and has_signal(results, one)
        for name in CRITERIA:
            losses = [_share(keeps_loss(results, one, name, lost)) for lost in _LOST]
            answers = [
                _share(keeps_answers(results, one, name, lost)) if asked else "" for lost in _LOST
            ]
            rows.append([one, name, *losses, *answers])
    return Section(
        "The share that keeps quality",
        ["Neurons kept where the loss is 1% or 5% above the model's as it is, or 1% or 5% of its "
         "right answers are lost: going down from the share that it keeps as it is (up, where "
         "that share loses more by this criterion), between the last measured share that keeps "
         "quality and the next, linear in the share's logarithm. Intervals are over seeds; of a "
         "given model there is the mean alone. Empty where answers were not asked for or are not "
         "clearly above chance."],
        table=(("model", "by", "99%, loss", "95%, loss", "99%, answers", "95%, answers"), rows),
    )  # fmt: skip


def _share(found: Estimate | None) -> str:
    if found is None:
        return "none"
    least = "\u2264 " if found.mean <= SHARES[-1] else ""
    if found.half_width is None:
        return f"{least}{found.mean:.1%}"
    return f"{least}{found.mean:.1%} \u00b1 {found.half_width:.1%}"


def _layers(results: StudyResults, who: Sequence[str]) -> Section:
    def draw(axes: Axes, one: str) -> None:
        base = as_it_is(results, one, LAYERS_AS_THEY_ARE)
        for share in LAYER_SHARES:
            line(axes, _curve(samples(results, ONE_LAYER.format(share), one), base), f"{share:.0%}")
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.set_xlabel("layer")
        axes.set_ylabel("nats over as it is")

    return Section(
        "One layer at a time",
        [f"{GATE} in one layer, all others as they are, on fewer blocks of the same text."],
        (
            lambda: _panels(who, draw),
            "Nats a token over the model as it is, by layer and share kept.",
        ),
    )


def _answers(results: StudyResults, who: Sequence[str]) -> Section:
    def draw(axes: Axes, one: str) -> None:
        for name in CRITERIA:
            values = samples(results, RIGHT.format(name), one)
            line(axes, [(share, estimate(listed)) for share, listed in values.items()], name)
        axes.axhline(first(results, CHANCE, one), color="#999999", linewidth=0.8)
        _by_share(axes, "right answers")

    rows = [
        [one, name, *(f"{estimate(values[share]).mean:.0%}" for share in SHARES)]
        for one in who for name in CRITERIA
        if (values := samples(results, RIGHT.format(name), one))
    ]  # fmt: skip
    weak = [one for one in who if not has_signal(results, one)]
    return Section(
        "Right answers",
        ["Questions of this package's own tasks (last words, four answers), few and easy: they "
         "say whether a model still works, and rank none. The grey line is chance. Of cells by "
         f"{GATE} alone.",
         *([f"Not clearly above chance as they are: {', '.join(weak)}."] if weak else [])],
        (lambda: _panels(who, draw), "Share of questions that are answered right."),
        (("model", "by", *(f"{share:.0%}" for share in SHARES)), rows),
    )  # fmt: skip


def _distributions(results: StudyResults, who: Sequence[str]) -> Section:
    def draw() -> Figure:
        figure, (sizes, mass, use) = plt.subplots(1, 3, figsize=(11, 3.4))
        for one in who:
            for axes, of in ((sizes, SIZES), (mass, MASS.format(GATE)), (use, USE)):
                line(axes, results.curve(of, one), one)
        sizes.set_xscale("log")
        sizes.set_xlabel("|gate|")
        sizes.set_ylabel("share of all gates")
        _by_share(mass, f"share of a row's {GATE}")
        mass.set_xlabel("share of neurons, the largest")
        use.set_xlabel("quantile of neurons")
        use.set_ylabel(f"times kept at {USED:.0%}, 1 is even")
        sizes.legend(frameon=False, fontsize=7)
        figure.tight_layout()
        return figure

    rows = []
    for one in who:
        for name in (GATE, PRODUCT):
            curve = dict(results.curve(MASS.format(name), one))
            rows.append([one, f"mass of {name}", *(f"{curve[share].mean:.0%}" for share in SHARES)])
    for one in who:
        use = {x: f"{found.mean:.2f}" for x, found in results.curve(USE, one)}
        rows.append([one, "use, by quantile", *(f"{x:.0%}: {y}" for x, y in use.items())])
    return Section(
        "Activations and the use of neurons",
        [f"Sizes of {GATE} over all rows and layers; the share of a row's sum that its largest "
         f"hold; and how often a neuron is among the largest {USED:.0%} of the rows that its "
         "expert gets, as a multiple of an even use, by quantile over all neurons."],
        (draw, "Sizes of gates, mass of the largest, use of neurons."),
        (("model", "of", *(f"{share:.0%}" for share in SHARES)), rows),
    )  # fmt: skip


_MEASURED: dict[str, Any] = {
    "text": None, "tokens": 2048, "length": 128, "layer_tokens": 512, "questions": 24,
}  # fmt: skip
_LITTLE = {**_MEASURED, "tokens": 256, "length": 64, "layer_tokens": 64, "questions": 2}

STUDY = Study(
    name="sparsity",
    question="How few of its activated neurons does a trained model need, and by which criterion?",
    presets={
        "tiny": Preset(small.training(small.TINY_STEPS), seeds=2, measuring=_LITTLE),
        "cpu": Preset(small.training(small.CPU_STEPS), measuring=_MEASURED),
    },
    cells=cells,
    reference=DENSE,
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens, and small given ones: the published claim "
        "is of models a thousand times larger.",
        "Nothing is trained at the smaller shares, and all layers keep the same share.",
        "Random and score-based choices alike compute every gate, and all but |gate| every up: the "
        "shares are of neurons, not of time.",
        "A few thousand tokens of one text and a few dozen easy questions.",
        "WINA (arXiv 2505.19427) and R-Sparse (arXiv 2504.19449) are their rules for one matrix, "
        "W_down, not their methods: WINA itself keeps what goes into W_down by |act(gate) x up|.",
    ),
    tasks=tasks,
    takes_models=True,
    sections=sections,
)  # fmt: skip
