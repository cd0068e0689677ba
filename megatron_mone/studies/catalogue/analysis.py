"""What routers and experts choose while they are trained: when they settle, what experts specialise
on, and how much neighbouring tokens share, which is what decoding can save."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from megatron_mone.studies.catalogue import ratio, small
from megatron_mone.studies.curves import measured_curves
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import percent
from megatron_mone.studies.measuring.token_classes import CLASSES
from megatron_mone.studies.statistics import Estimate, estimate
from megatron_mone.studies.study import Cell, Preset, Section, Study, Trained, Values
from megatron_mone.studies.tasks import Task

CHUNKS = (1, 2, 4, 8, 16)
"""Neighbouring tokens."""
MONE, MOE = ratio.mone(ratio.MAIN), ratio.TOTAL
LAYERS = (1, 2)
_CHECKPOINTS = 6
_ALONE = " by use alone"
_BAND = "Mean of seeds with its 95% interval."


def cells(values: Values) -> Sequence[Cell]:
    """Two of ratio's, with checkpoints along the way."""
    often = {"save_interval": max(1, values["train_iters"] // _CHECKPOINTS)}
    return [
        Cell(one.name, one.meaning, {**one.values, **often})
        for one in ratio.cells(values)
        if one.name in (MONE, MOE)
    ]


def tasks(runs: Sequence[Trained], models: Mapping[str, Path], preset: Preset) -> Sequence[Task]:
    """One a run."""
    del models
    return [
        Task(one.cell.name, one.seed, "analyse:measure",
             {"checkpoints": str(one.folder / "checkpoints"), **preset.measuring})
        for one in runs
    ]  # fmt: skip


def findings(results: StudyResults) -> list[str]:
    """When choices settle, what experts are for, who goes together, and what neighbours share."""
    found = []
    for layer in LAYERS:
        for what, of, cell in (
            ("experts", "router saturation", MONE), ("experts", "router saturation", MOE),
            ("neurons", "mask saturation", MONE),
        ):  # fmt: skip
            curve = results.curve(f"{of}, layer {layer}", cell)
            by_use = results.curve(f"{of}{_ALONE}, layer {layer}", cell)
            if curve and by_use:
                found.append(
                    f"{cell}, layer {layer}: after {curve[0][0]:.0f} of {curve[-1][0]:.0f} steps "
                    f"{percent(curve[0][1])} of a token's last choice of {what} is made already; "
                    f"{percent(by_use[0][1])} would be by how often each is used alone."
                )
        found += [*_specialised(results, layer), *_together(results, layer)]
        found += _shared(results, layer)
    return found


def _specialised(results: StudyResults, layer: int) -> list[str]:
    found = []
    for cell in (MONE, MOE):
        favourite = results.curve(f"favourite expert of a token id, layer {layer}", cell)
        by_lot = results.curve(f"favourite expert by lot, layer {layer}", cell)
        if favourite and by_lot:
            found.append(
                f"{cell}, layer {layer}: the favourite expert of a token id has "
                f"{percent(favourite[-1][1])} of its occurrences, {percent(by_lot[-1][1])} if "
                "choices are dealt to tokens by lot."
            )
    return found


def _together(results: StudyResults, layer: int) -> list[str]:
    partner = results.curve(f"neurons: largest partner, layer {layer}", MONE)
    by_use = results.curve(f"neurons: largest partner{_ALONE}, layer {layer}", MONE)
    if not (partner and by_use):
        return []
    return [
        f"{MONE}, layer {layer}: the neuron that goes with another most is there in "
        f"{percent(partner[-1][1])} of that other's rows, {percent(by_use[-1][1])} if neurons were "
        "chosen apart."
    ]


def used(layer: int, by_use: bool = False) -> str:
    """The measure of neurons that neighbouring rows of an expert use, or would if they chose
    apart."""
    return f"used by an expert's rows{_ALONE if by_use else ''}, layer {layer}"


def _shared(results: StudyResults, layer: int) -> list[str]:
    sizes = read(results, layer)
    rows = dict(results.curve(used(layer), MONE))
    apart = dict(results.curve(used(layer, by_use=True), MONE))
    if not (sizes and rows and apart):
        return []
    first, last = min(sizes), max(sizes)
    return [
        f"{MONE}, layer {layer}: {last} neighbouring rows of an expert use {percent(rows[last])} "
        f"of its neurons, {percent(apart[last])} if they chose apart; one row uses "
        f"{percent(rows[first])}. {last} neighbouring tokens read {percent(sizes[last])} of the "
        f"weights of the experts that they use, one token {percent(sizes[first])}."
    ]


def read(results: StudyResults, layer: int) -> dict[int, Estimate]:
    """Tokens -> weights that MoNE reads for so many neighbours, as a share of all weights of the
    experts that they use: all gates, and up and down of the neurons that any of them keeps."""
    experts = results.measured(f"experts used by neighbours, layer {layer}", MONE)
    neurons = results.measured(f"used by neighbours, layer {layer}", MONE)
    found: dict[int, Estimate] = {}
    for place, size in enumerate(CHUNKS):
        shares = [
            (1 + 2 * neurons[seed].y[place] / one.y[place]) / 3
            for seed, one in experts.items()
            if one.y[place] > 0
        ]
        if shares:
            found[size] = estimate(shares)
    return found


def sections(results: StudyResults) -> list[Section]:
    """Settling, specialisation, company, likeness, and what neighbours share."""
    if not results.measures:
        return []
    both = [(cell, layer) for cell in (MONE, MOE) for layer in LAYERS]

    def over_steps(of: str, y: str) -> partial[Figure]:
        lines = [(f"{one}, layer {layer}", cell, f"{cell}, layer {layer}{note}")
                 for one, note in _with_control(of) for cell, layer in both]  # fmt: skip
        return partial(measured_curves, results, lines, x="step", y=y)

    rows = [(used(layer, bool(note)), MONE, f"layer {layer}{note}")
            for note in ("", _ALONE) for layer in LAYERS]  # fmt: skip
    return [
        Section(
            "When choices of experts settle",
            ["Share of the experts that a token has after the last step which it has already "
             "(router saturation of OLMoE, arXiv 2409.02060, and FLAME-MoE, arXiv 2505.20225); by "
             "use alone: if only the experts' shares of use were the same."],
            figure=(over_steps("router saturation", "share of the last choice"), _BAND),
        ),
        Section(
            "When choices of neurons settle",
            ["The same of the neurons of an expert, over tokens that have the expert at both."],
            figure=(over_steps("mask saturation", "share of the last choice"), _BAND),
        ),
        Section(
            "What experts specialise on",
            ["Largest share of a class's tokens that one expert has, after the last step (domain "
             "specialisation of OLMoE, with classes of tokens for domains), mean of seeds; below, "
             "of each token id its favourite expert (its vocabulary specialisation)."],
            figure=(over_steps("favourite expert", "share of occurrences"), _BAND),
            table=_class_table(results, both),
        ),
        Section(
            "Experts chosen together",
            ["Of the tokens with the expert of the row, the share that has that of the column too "
             "(co-activation of OLMoE), first seed, after the last step."],
            figure=(partial(_heat, results, both), "Shares; an expert with itself is left out."),
        ),
        Section(
            "Neurons chosen together",
            ["The same of the neurons of an expert: of each its most frequent partner, mean over "
             "neurons; by use alone: every neuron's rows dealt by lot."],
            figure=(over_steps("neurons: largest partner", "share of a neuron's rows"), _BAND),
        ),
        Section(
            "How alike experts are",
            ["Cosine of the gate, up and down vectors of neurons of two experts that are matched, "
             "the most alike first (after arXiv 2406.18219, which matches them optimally, of each "
             "matrix by itself); noise: of random vectors, the best match of which is not 0 "
             "either."],
            figure=(over_steps("similarity", "mean cosine"), _BAND),
        ),
        Section(
            "What neighbouring tokens share",
            ["Share of the neurons that any of so many neighbours uses: 1 less the chunk-level "
             "sparsity of BlockFFN (arXiv 2507.08771). Decoding several tokens at a time (of a "
             "batch, or guessed ahead) reads a weight once for all that use it: the table says how "
             "much is read, of all gates and of up and down where a neuron is used."],
            figure=(partial(measured_curves, results, rows, x="neighbouring rows of one expert",
                            y="share of its neurons used", log_x=True), _BAND),
            table=_read_table(results),
        ),
    ]  # fmt: skip


def _with_control(of: str) -> list[tuple[str, str]]:
    """(measure, note of the legend): a measure and what it is by chance."""
    return {
        "favourite expert": [("favourite expert of a token id", ""),
                             ("favourite expert by lot", ", by lot")],
        "similarity": [("similarity of matched neurons", ""),
                       ("similarity of matched noise", ", noise")],
    }.get(of, [(of, ""), (of + _ALONE, _ALONE)])  # fmt: skip


def _class_table(
    results: StudyResults, both: Sequence[tuple[str, int]]
) -> tuple[list[str], list[list[str]]]:
    def largest(cell: str, layer: int, place: int) -> str:
        shares = results.measured(f"experts by class, layer {layer}", cell).values()
        size = [len(one.y) // len(CLASSES) for one in shares]
        return percent(estimate([
            max(one.y[place * n : (place + 1) * n]) for one, n in zip(shares, size, strict=True)
        ]))  # fmt: skip

    tokens = next(iter(results.measured("share of tokens by class", MONE).values())).y
    rows = [
        [name, f"{tokens[place]:.1%}", *(largest(cell, layer, place) for cell, layer in both)]
        for place, name in enumerate(CLASSES)
        if tokens[place]
    ]
    return ["class", "of all tokens", *(f"{cell}, layer {layer}" for cell, layer in both)], rows


def _read_table(results: StudyResults) -> tuple[list[str], list[list[str]]]:
    rows = []
    for layer in LAYERS:
        shares = read(results, layer)
        names = ("experts used by neighbours", "used by neighbours", f"used by neighbours{_ALONE}")
        curves = [dict(results.curve(f"{of}, layer {layer}", MONE)) for of in names]
        moe = dict(results.curve(f"experts used by neighbours, layer {layer}", MOE))
        rows += [
            [str(layer), str(size), percent(moe[size]), *(percent(one[size]) for one in curves),
             percent(shares[size])]
            for size in shares
        ]  # fmt: skip
    return ["layer", "tokens", f"experts used, {MOE}", "experts used, MoNE", "neurons used, MoNE",
            "if tokens chose apart", "read of these experts' weights"], rows  # fmt: skip


def _heat(results: StudyResults, both: Sequence[tuple[str, int]]) -> Figure:
    figure, axes = plt.subplots(1, len(both), figsize=(3 * len(both), 3))
    for one, (cell, layer) in zip(axes, both, strict=True):
        measured = results.measured(f"co-activation of experts, layer {layer}", cell)
        flat = measured[min(measured)].y
        size = round(len(flat) ** 0.5)
        shares = [list(flat[row * size : (row + 1) * size]) for row in range(size)]
        for place in range(size):
            shares[place][place] = float("nan")
        image = one.imshow(shares, vmin=0, cmap="viridis")
        one.set_title(f"{cell}, layer {layer}", fontsize=8)
        figure.colorbar(image, ax=one, shrink=0.7)
    figure.tight_layout()
    return figure


STUDY = Study(
    name="analysis",
    question="What do routers and experts choose during training, and how much of it do "
    "neighbouring tokens share?",
    presets={
        "tiny": Preset(small.training(small.TINY_STEPS), seeds=2, measuring={"windows": 8}),
        "cpu": Preset(small.training(small.CPU_STEPS), measuring={"windows": 128}),
    },
    cells=cells,
    reference=MOE,
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens: larger ones settle over far longer "
        "trainings, and the experts here are 8, of which 2 are chosen.",
        "The MoE's neurons are not chosen, so only its routers are looked at.",
        "Classes are rules on a token's text; the text is of few authors.",
        "OLMoE (arXiv 2409.02060) shows vocabulary specialisation of a token's first expert, mean "
        "over ids; here of any of its experts, mean over occurrences.",
        "How much is read counts weights, not time: no kernel was timed for it.",
    ),
    tasks=tasks,
    sections=sections,
)
