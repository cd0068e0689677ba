"""What a trained model loses without some of its experts or neurons, by what chose them."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron_mone.studies.catalogue import ratio, small
from megatron_mone.studies.curves import measured_curves
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import nats
from megatron_mone.studies.page import interval
from megatron_mone.studies.statistics import Estimate, difference, estimate
from megatron_mone.studies.study import Cell, Preset, Section, Study, Trained, Values
from megatron_mone.studies.tasks import Task

RANDOM = "lot"
EXPERTS = ("frequency", "router weight", "output norm", "REAP", "reconstruction",
           "similarity (STUN)")  # fmt: skip
NEURON_CRITERIA = ("frequency", "|gate|", "|gate x up|", "weight-informed", "MoE-Pruner")
NEURONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of an expert's neurons."""
BY_SCORE, BY_USE = "skipped by router weight", "skipped by use in the sequence"
SCORE_SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
USE_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SKIPPED = "routed rows "
ALONE, LARGEST = "loss without one expert", "largest output of an expert"
PARTS = (("experts", EXPERTS), ("neurons", NEURON_CRITERIA))
SUPER = 3
"""An expert is called super whose removal raises the loss this many times what any other's does."""
_SHOWN = 3
MONE, MOE = ratio.mone(ratio.MAIN), ratio.TOTAL


def cells(values: Values) -> Sequence[Cell]:
    """Two of ratio's, to share its runs."""
    return [one for one in ratio.cells(values) if one.name in (MONE, MOE)]


def tasks(runs: Sequence[Trained], models: Mapping[str, Path], preset: Preset) -> Sequence[Task]:
    """One a run."""
    del models
    return [
        Task(one.cell.name, one.seed, "prune:measure",
             {"checkpoints": str(one.folder / "checkpoints"), **preset.measuring})
        for one in runs
    ]  # fmt: skip


def _at(results: StudyResults, of: str, cell: str, x: float) -> dict[int, float]:
    """Seed -> nats a token at x, of those that were measured there."""
    return {
        seed: one.y[one.x.index(x)]
        for seed, one in results.measured(of, cell).items() if x in one.x
    }  # fmt: skip


def rise(results: StudyResults, of: str, cell: str, x: float) -> Estimate | None:
    """Nats a token above the model as it is, seed by seed; None where it was not measured."""
    found = _at(results, of, cell, x)
    if len(found) < max(1, len(results.measured(of, cell))):
        return None
    return difference(found, _at(results, of, cell, 0))


class Half(NamedTuple):
    """Nats a token above the whole model, without half of a part: by the best of so many criteria,
    by lot, and by the one over the other."""

    best: Estimate
    by: str
    of: int
    lot: Estimate
    over_lot: Estimate


def halves(results: StudyResults, cell: str) -> dict[str, Half]:
    """Part -> what half of it costs a cell's models, of the parts that were measured."""
    found = {}
    for what, names in PARTS:
        rises = {
            name: value for name in names
            if (value := rise(results, f"{what} by {name}", cell, 0.5)) is not None
        }  # fmt: skip
        lot = rise(results, f"{what} by {RANDOM}", cell, 0.5)
        if rises and lot is not None:
            best = min(rises, key=lambda name: rises[name].mean)
            ends = (_at(results, f"{what} by {name}", cell, 0.5) for name in (best, RANDOM))
            found[what] = Half(rises[best], best, len(rises), lot, difference(*ends))
    return found


def findings(results: StudyResults) -> list[str]:
    """What half of the experts and of the neurons cost, by the best criterion and by lot; then
    skipping, and experts that stand out."""
    found = []
    for cell in (MONE, MOE):
        found += [
            f"{cell} without half of its {what}: {nats(half.best)} by {half.by}, the best of "
            f"{half.of} criteria; {nats(half.lot)} by lot."
            for what, half in halves(results, cell).items()
        ]
        found += [*_skipping_found(results, cell), *_super_found(results, cell)]
    return found


def _skipping_found(results: StudyResults, cell: str) -> list[str]:
    value = rise(results, BY_SCORE, cell, 0.5)
    if value is None:
        return []
    left_out = dict(results.curve(SKIPPED + BY_SCORE, cell))[0.5]
    return [
        f"{cell} with experts skipped whose weight is below half of the token's largest: "
        f"{left_out.mean:.0%} of the routed rows left out, {nats(value)}."
    ]


def alone(results: StudyResults, cell: str) -> dict[int, dict[tuple[int, int], float]]:
    """Seed -> (layer, expert) -> nats a token that the model rises without that expert alone."""
    found: dict[int, dict[tuple[int, int], float]] = {}
    wholes = results.measured(f"experts by {EXPERTS[0]}", cell)
    for layer in _layers(results, cell):
        for seed, one in results.measured(f"{ALONE}, layer {layer}", cell).items():
            rises = found.setdefault(seed, {})
            for expert, loss in zip(one.x, one.y, strict=True):
                rises[layer, int(expert)] = loss - wholes[seed].y[0]
    return found


def _layers(results: StudyResults, cell: str) -> list[int]:
    start = f"{ALONE}, layer "
    names = {one.of for one in results.measures if one.cell == cell and one.of.startswith(start)}
    return sorted(int(name.removeprefix(start)) for name in names)


def median(values: Sequence[float]) -> float:
    """The upper of the two in the middle where there are two."""
    return sorted(values)[len(values) // 2]


def _over_the_next(rises: Mapping[tuple[int, int], float], place: int) -> float:
    """How many times as much an expert is missed as the one after it, ordered by that."""
    ordered = sorted(rises.values(), reverse=True)
    return ordered[place] / max(ordered[place + 1], 1e-9)


def _super_found(results: StudyResults, cell: str) -> list[str]:
    by_seed = alone(results, cell)
    if not by_seed:
        return []
    times = [_over_the_next(rises, 0) for rises in by_seed.values()]
    means = "; ".join(
        f"layer {layer} {nats(estimate([_mean_of(rises, layer) for rises in by_seed.values()]))}"
        for layer in _layers(results, cell)
    )
    return [
        f"{cell} without one expert, mean over a layer's: {means}. The expert that is missed most "
        f"is missed {estimate(times).mean:.1f} times as much as the next (mean of {len(times)} "
        f"seeds): {sum(time > SUPER for time in times)} of {len(times)} models have a super "
        f"expert, one that is missed more than {SUPER} times as much."
    ]


def _mean_of(rises: Mapping[tuple[int, int], float], layer: int) -> float:
    found = [rise for (number, _), rise in rises.items() if number == layer]
    return sum(found) / len(found)


def sections(results: StudyResults) -> list[Section]:
    """Losses by share removed, a figure a cell and kind; skipping; experts one by one."""
    found = []
    for what, names in PARTS:
        for cell in results.who(f"{what} by {RANDOM}"):
            lines = [(f"{what} by {name}", cell, name) for name in (*names, RANDOM)]
            draw = partial(measured_curves, results, lines, x=f"share of {what} removed",
                           y="loss, nats a token")  # fmt: skip
            found.append(Section(
                f"{cell}: {what} removed", figure=(draw, "Mean of seeds with its 95% interval."),
                table=_table(results, what, cell, names),
            ))  # fmt: skip
    for of, x in ((BY_SCORE, "share of the token's largest weight"),
                  (BY_USE, "share of an even part of the sequence")):  # fmt: skip
        if who := results.who(of):
            draw = partial(measured_curves, results, [(of, cell, cell) for cell in who], x=x,
                           y="loss, nats a token")  # fmt: skip
            found.append(Section(
                f"Experts {of}", figure=(draw, "Mean of seeds with its 95% interval."),
                table=_skipping_table(results, of),
            ))  # fmt: skip
    if any(alone(results, cell.name) for cell in results.cells):
        found.append(_one_by_one(results))
    return found


def _table(
    results: StudyResults, what: str, cell: str, names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    shares = [x for x, _ in results.curve(f"{what} by {RANDOM}", cell)][1:]
    rows = [
        [name, *(interval(value, "+.4f") if value else ""
                 for x in shares for value in [rise(results, f"{what} by {name}", cell, x)])]
        for name in (*names, RANDOM)
    ]  # fmt: skip
    return ["by", *(f"{x:.3g}" for x in shares)], rows


def _skipping_table(results: StudyResults, of: str) -> tuple[list[str], list[list[str]]]:
    rows = []
    for cell in results.who(of):
        left_out = dict(results.curve(SKIPPED + of, cell))
        for x, share in left_out.items():
            value = rise(results, of, cell, x)
            rows.append(
                [cell, f"{x:g}", f"{share.mean:.1%}", interval(value, "+.4f") if value else ""]
            )
    return ["cell", "below", "routed rows left out", "nats a token over none left out"], rows


def _one_by_one(results: StudyResults) -> Section:
    """The experts of each model that are missed most."""
    rows = []
    for cell in results.cells:
        for seed, rises in alone(results, cell.name).items():
            ordered = sorted(rises, key=lambda one: -rises[one])
            for place, (layer, expert) in enumerate(ordered[:_SHOWN]):
                largest = results.measured(f"{LARGEST}, layer {layer}", cell.name)[seed].y
                rows.append([
                    cell.name, str(seed), f"{layer}, {expert + 1}", f"{rises[layer, expert]:+.4f}",
                    f"{_over_the_next(rises, place):.1f}", f"{largest[expert]:.2f}",
                    f"{largest[expert] / median(largest):.1f}",
                ])  # fmt: skip
    return Section(
        "Experts that are missed most",
        ["Each expert is removed alone. Super experts (arXiv 2507.23279) are few, their removal "
         "ruins a model, and their down projection gives extreme values: shown are the experts of "
         "each model that are missed most, with the largest absolute value of their output. Here "
         f"one is called super that is missed more than {SUPER} times as much as the next. The "
         "paper finds them by that output: above the 99.5th percentile of all experts' and above a "
         "tenth of the largest, in layers where massive activations form. Of fewer than 200 "
         "experts no other than the one with the largest can be above that percentile, so that "
         "rule is not used here."],
        table=(["cell", "seed", "layer, expert", "rise alone", "of the next's", "largest output",
                "of the layer's median"], rows),
    )  # fmt: skip


STUDY = Study(
    name="prune",
    question="What does a trained model lose without some of its experts or neurons, and which "
    "rule chooses them best?",
    presets={
        "tiny": Preset(small.training(small.TINY_STEPS), seeds=2,
                       measuring={"windows": 8, "recorded": 8, "draws": 1}),
        "cpu": Preset(small.training(small.CPU_STEPS),
                      measuring={"windows": 128, "recorded": 64, "draws": 3}),
    },
    cells=cells,
    reference=MOE,
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens, with 8 experts of which 2 are chosen: half "
        "of the experts is much more of such a model than of one with 64 or 128.",
        "One shot: nothing is trained after a removal, and weights that stay are not changed.",
        "The same number of experts a layer, and of neurons an expert.",
        "MoE-Pruner's scores (arXiv 2410.12013) choose whole neurons here, not single weights, and "
        "the weight-informed ones (WINA, arXiv 2505.19427) choose for good, not for a token, and "
        "by W_down, for which WINA has no norm; of STUN (arXiv 2409.06211) its removal of experts "
        "by clusters of router rows, without how often they are chosen together; REAP (arXiv "
        "2510.13999) is as published, reconstruction (Lu et al., arXiv 2402.14800) has one norm "
        "over all tokens and not a sum over batches, output norm (MAN, arXiv 2606.15716) is from "
        "its description.",
        "Skipping by weight (Lu et al.) has one share for all layers, not each layer's median; by "
        "use it is PESF's of EAC-MoE (arXiv 2508.01625), weights that stay summing to 1 again.",
        "Neurons of the MoE are scored on every row of their expert, those of MoNE where kept for "
        "|gate x up|, the weight-informed and MoE-Pruner's.",
    ),
    tasks=tasks,
    sections=sections,
)  # fmt: skip
