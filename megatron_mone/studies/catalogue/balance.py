"""Whether the balance loss balances neurons, by type, coefficient and scope, at what price, and
whether it does so or shrinks gates; the published form, as far as it is known, beside ours."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mone.studies.catalogue import large, small
from megatron_mone.studies.curves import measured_curves
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import compared, signed
from megatron_mone.studies.measuring.shrunk_gates import BALANCED, SIZE, TYPES
from megatron_mone.studies.page import interval
from megatron_mone.studies.statistics import Estimate, difference, estimate
from megatron_mone.studies.study import Cell, Preset, Section, Study, Trained, Values
from megatron_mone.studies.tasks import Found, Task

NONE, DEFAULT, RAW, BIAS = "none", "selected, 0.1", "raw, 0.1", "bias"
NORMALIZED = "normalized, 0.1"
AFTER, SHARED = "selected, 0.1, P after top-k", "selected, 0.1, shared expert"
PUBLISHED, PUBLISHED_NONE = "published form", "published form, none"
VARIANCE, DEAD = "variance of neuron load", "share of neurons never kept"
FACTORS = (1.0, 0.5, 0.25, 0.125, 0.0625)
# Of which load is drawn, and sentences tell load and gates.
_DRAWN = (NONE, RAW, DEFAULT, NORMALIZED, "entropy, 0.1", BIAS, PUBLISHED, PUBLISHED_NONE)


def cells(values: Values) -> Sequence[Cell]:
    """Every type at one coefficient, two of them at others, the default type over the global batch,
    none; the published form, at the router's own coefficient, and what it is made of."""
    coefficients = [("raw", one) for one in (1e-3, 1e-2, 0.1)]
    coefficients += [("normalized", 0.1), ("entropy", 0.1)]
    coefficients += [("selected", one) for one in (1e-3, 1e-2, 0.1, 1.0)]
    width = values["moe_ffn_hidden_size"]
    shared = {"moe_shared_expert_intermediate_size": width}
    after: dict[str, Any] = {"mone_router_loss_probs": "after_topk"}
    if values.get("moe_router_fusion"):  # whose kernel knows the other probabilities alone
        after["moe_router_fusion"] = False
    published = {
        **after, **shared, "mone_ng_loss_type": "raw",
        "mone_ng_loss_coeff": values["moe_aux_loss_coeff"],
    }  # fmt: skip
    return [
        Cell(NONE, "coefficient 0", {"mone_ng_loss_coeff": 0.0}),
        *(Cell(f"{kind}, {one:g}", f"P of the type {kind}, coefficient {one:g}",
               {"mone_ng_loss_type": kind, "mone_ng_loss_coeff": one})
          for kind, one in coefficients),
        Cell("selected, 0.1, global", "statistics over all rows of the last step",
             {"mone_ng_loss_scope": "global_batch"}),
        Cell(BIAS, "no loss: a bias for choosing, moved by the sign of the load's error",
             {"mone_ng_loss_type": "bias"}),
        Cell(AFTER, "the router's loss averages probabilities after top-k, not before", after),
        Cell(SHARED, f"a shared expert of {width} neurons beside the routed ones, all kept: "
             "more parameters and operations than the others", shared),
        Cell(PUBLISHED, "raw gates, the router's P after top-k, a shared expert; coefficient "
             f"{values['moe_aux_loss_coeff']:g}, as the router's loss has", published),
        Cell(PUBLISHED_NONE, "the same without the neuron loss",
             {**after, **shared, "mone_ng_loss_coeff": 0.0}),
    ]  # fmt: skip


def _on_gpus(preset: Preset) -> Preset:
    """Without the type whose loss no kernel of a GPU has."""
    names = [cell.name for cell in cells(preset.values) if cell.name != NORMALIZED]
    said = f"{NORMALIZED!r} has no GPU kernel: it was trained at small size."
    return replace(preset, only=tuple(names), limits=(*preset.limits, said))


def read(run: Trained, preset: Preset) -> list[Found]:
    """Neuron load over the run's logging windows, all layers together."""
    del preset
    windows: dict[int, list[tuple[float, float]]] = {}
    dead: dict[int, float] = {}
    for load in (load for loads in run.result.neuron_load.values() for load in loads):
        step, limits = load.histogram.step, load.histogram.limits
        middles = [(low + high) / 2 for low, high in zip((0.0, *limits), limits, strict=False)]
        windows.setdefault(step, []).extend(zip(middles, load.histogram.counts, strict=True))
        dead[step] = dead.get(step, 0.0) + load.dead
    neurons = {step: sum(count for _, count in bins) for step, bins in windows.items()}
    steps = sorted(step for step, count in neurons.items() if count)
    spread = [sum(count * (at - 1) ** 2 for at, count in windows[step]) / neurons[step]
              for step in steps]  # fmt: skip
    return [
        (VARIANCE, steps, spread),
        (DEAD, steps, [dead[step] / neurons[step] for step in steps]),
    ]


def tasks(runs: Sequence[Trained], models: Mapping[str, Path], preset: Preset) -> list[Task]:
    """One a run: how large its gates are; of runs without a loss every loss at shrunk gates."""
    del models
    return [
        Task(run.cell.name, run.seed, "shrunk_gates:measure",
             {"checkpoints": str(run.folder / "checkpoints"), **preset.measuring,
              "factors": FACTORS if run.cell.name == NONE else ()})
        for run in runs
    ]  # fmt: skip


def findings(results: StudyResults) -> list[str]:
    """What became of the neurons and the gates, where the minima lie, then the losses' price."""
    others = [cell.name for cell in results.cells if cell.name != NONE]
    pairs = [(name, NONE) for name in others if name not in (PUBLISHED, PUBLISHED_NONE, SHARED)]
    pairs += [(AFTER, DEFAULT), (SHARED, DEFAULT), (PUBLISHED, PUBLISHED_NONE)]
    pairs = [pair for pair in pairs if results.has(*pair)]
    typical = [pair for pair in pairs if pair[0] in _DRAWN]
    said = [_of_load(results, *pair) for pair in typical]
    said += [_of_size(results, *pair) for pair in typical]
    return [*_minima(results), *said, *(compared(results, *pair) for pair in pairs)]


def sections(results: StudyResults) -> list[Section]:
    """Load over training, the losses at shrunk gates, and the size of trained gates."""
    names = [cell.name for cell in results.cells]
    at_end = [
        (name, *(interval(_last(results, of, name), ".4f") for of in (VARIANCE, DEAD)))
        for name in names
    ]
    scaled = [
        (kind, *(interval(found, ".4f") for _, found in results.curve(kind, NONE)))
        for kind in (*TYPES, BALANCED) if results.curve(kind, NONE)
    ]  # fmt: skip
    sizes = [(name, interval(_size(results, name), ".4f"),
              "" if name == NONE else interval(gates_over(results, name, NONE), "+.4f"))
             for name in names if results.measured(SIZE, name)]  # fmt: skip
    drawn = (
        lambda: measured_curves(
            results, [(VARIANCE, name, name) for name in _DRAWN], x="step",
            y="variance of load, (multiples of balanced)^2", log_y=True,
        ),
        "Variance of neuron load by step, mean of seeds with its 95% interval.",
    )  # fmt: skip
    found = [
        Section(
            "Load over training",
            ["Load of a neuron is in multiples of the balanced one; its variance is over all "
             "neurons of all layers, of histograms whose edges are a quarter of an octave apart, "
             "each neuron at the middle of its bin; 0 is balanced. The table is of the last "
             "logging window."],
            drawn, (("cell", "variance of load", "never kept, share"), at_end),
        )
    ]  # fmt: skip
    if not scaled:
        return found
    shown = [row + ("",) * (1 + len(FACTORS) - len(row)) for row in scaled]
    shrunk = (
        lambda: measured_curves(
            results, [(kind, NONE, kind) for kind in TYPES], x="gates multiplied by",
            y="loss without coefficient", log_x=True, log_y=True,
        ),
        "The types of loss at shrunk gates, mean of seeds with its 95% interval.",
    )  # fmt: skip
    return [
        *found,
        Section(
            "Where each loss has its minimum",
            [f"Runs of {NONE!r}, whose gates no loss has shaped: value of every type, without its "
             "coefficient, in text that was held out, at fixed routing and fixed kept neurons, "
             "gates multiplied by a factor. A type that falls with the factor has its minimum at "
             "gates of 0, whatever the load. The last row is what raw would be at the same gates "
             "if every neuron were kept equally often."],
            shrunk, (("type", *(f"{one:g}" for one in FACTORS)), shown),
        ),
        Section(
            "Size of the gates that each loss trained",
            ["Mean |gate| of kept neurons in text that was held out, mean over layers."],
            table=(("cell", "mean |gate|", f"over {NONE}"), sizes),
        ),
    ]  # fmt: skip


def _last(results: StudyResults, of: str, name: str) -> Estimate:
    return estimate(list(_ends(results, of, name).values()))


def _ends(results: StudyResults, of: str, name: str) -> dict[int, float]:
    """Seed -> the last value of what was read of a run."""
    return {seed: one.y[-1] for seed, one in results.measured(of, name).items()}


def _sizes(results: StudyResults, name: str) -> dict[int, float]:
    """Seed -> mean |gate| of kept neurons, mean over layers."""
    return {seed: statistics.fmean(one.y) for seed, one in results.measured(SIZE, name).items()}


def _size(results: StudyResults, name: str) -> Estimate:
    return estimate(list(_sizes(results, name).values()))


def gates_over(results: StudyResults, name: str, against: str) -> Estimate:
    """Mean |gate| of kept neurons of a cell less another's, seed by seed."""
    return difference(_sizes(results, name), _sizes(results, against))


def _minima(results: StudyResults) -> list[str]:
    """What shrinking every gate does to each type, and what balancing could do to raw."""
    said = []
    for kind in TYPES:
        curve = dict(results.curve(kind, NONE))
        if curve:
            whole, least = curve[max(curve)].mean, curve[min(curve)].mean
            said.append(
                f"{kind} is {least:.4f} with every gate of {NONE!r} times {min(curve):g} and "
                f"{whole:.4f} as they are, at the same load: "
                + ("it falls with the gates." if least < 0.99 * whole else "it does not fall.")
            )
    even = results.curve(BALANCED, NONE)
    if even:
        raw = dict(results.curve("raw", NONE))[max(FACTORS)].mean
        said.append(
            f"An even load at the same gates would make raw {even[0][1].mean:.4f} of {raw:.4f}: "
            f"{even[0][1].mean / raw:.1%} of it is the gates' size alone."
        )
    return said


def _of_load(results: StudyResults, name: str, against: str) -> str:
    found = difference(_ends(results, VARIANCE, name), _ends(results, VARIANCE, against))
    return _change("variance of neuron load at the end", found, name, against)


def _of_size(results: StudyResults, name: str, against: str) -> str:
    if not (results.measured(SIZE, name) and results.measured(SIZE, against)):
        return f"{name}: the size of its gates was not measured."
    return _change("mean |gate| of kept neurons", gates_over(results, name, against), name, against)


def _change(what: str, found: Estimate, name: str, against: str) -> str:
    if found.half_width is None:
        return f"{name}: {what} {signed(found)} from {against}, of one seed."
    word = "higher than" if found.mean > 0 else "lower than"
    verdict = word if found.is_clear else "not told apart from"
    return f"{name}: {what} {verdict} {against}'s: {signed(found)}, {found.count} seeds paired."


STUDY = Study(
    name="balance",
    question="Does the neuron balance loss keep neurons in use or only shrink gates, which form, "
    "and at what loss?",
    presets={
        "tiny": Preset(
            small.training(small.TINY_STEPS), seeds=2, only=(NONE, DEFAULT),
            measuring={"windows": 16},
        ),
        "cpu": Preset(small.training(small.CPU_STEPS), measuring={"windows": 16}),
        **{name: _on_gpus(preset) for name, preset in large.PRESETS.items()},
        **large.largest(NONE, RAW, DEFAULT),
    },
    cells=cells,
    reference=NONE,
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens: neurons die and specialise over longer "
        "trainings.",
        "The published coefficient, scope and width of the shared expert are not known to us; the "
        "router's P after top-k is what a reviewer says of it.",
        "One coefficient weighs types differently: raw's value is about the mean |gate| times the "
        "neurons kept, the scale-free ones' about 1, entropy's about 0.",
        "Gates are shrunk as numbers, layer by layer, not by training: it says where a loss's "
        "minimum lies, not whether training goes there, which the sizes of trained gates say.",
    ),
    read=read,
    tasks=tasks,
    sections=sections,
)  # fmt: skip
