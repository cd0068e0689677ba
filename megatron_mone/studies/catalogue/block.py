"""What it costs in loss to choose neurons in blocks, as matrix units would have them, and what it
saves in time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from megatron_mone.studies.catalogue import large, ratio, small
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import compared, use
from megatron_mone.studies.measuring.step_times import CPU_DENSE, CPU_MONE, LOAD, experts_of
from megatron_mone.studies.page import interval
from megatron_mone.studies.study import Cell, Preset, Section, Study, Trained, Values
from megatron_mone.studies.tasks import Found, Task

SINGLE = "B = 1"
DENSE = (ratio.TOTAL, ratio.ACTIVE)
PLANNED = "planned step of 128 H100, ms"
PLANNED_SHARE = "planned step of 128 H100 with as many blocks, ms"
_STEPS = {"H100, blocks of B (planned)": PLANNED,
          "H100, as many blocks (planned)": PLANNED_SHARE}  # fmt: skip
_CPU = "one CPU core (measured)"
RUN = "step of a run beside others, ms"
_CONFIG, _DENSE_CONFIG, _PLANNED_NEURONS = "moe-30b-a3b-mone-128", "moe-30b-a3b-128", 768
_MEASURING = {"plan": {"gpus": 128, "cluster": "h100-ndr"}, "seconds": 30.0}


def sizes(values: Values) -> list[int]:
    """Block sizes, from single neurons to one block of all that are kept."""
    kept = int(values["moe_ffn_hidden_size"] * values["mone_neuron_ratio"])
    return sorted({size for size in (1, 2, 8, 16, 32, kept // 2, kept) if kept % size == 0})


def _on_gpus(preset: Preset) -> Preset:
    """With sizes that the GPU has kernels of: powers of two from 16, half and all of the kept."""
    kept = sizes(preset.values)[-1]
    taken = [size for size in sizes(preset.values) if size in (1, 16, 32, kept // 2, kept)]
    return replace(preset, only=(*(f"B = {size}" for size in taken), *DENSE))


def cells(values: Values) -> Sequence[Cell]:
    """A cell a block size, and the dense MoEs that MoNE is to be faster than."""
    kept = int(values["moe_ffn_hidden_size"] * values["mone_neuron_ratio"])
    dense = [cell for cell in ratio.cells(values) if cell.name in DENSE]
    return [
        *(Cell(f"B = {size}", f"{kept // size} blocks of {size} adjacent neurons a row",
               {"mone_neuron_block": size}) for size in sizes(values)),
        *dense,
    ]  # fmt: skip


def read(run: Trained, preset: Preset) -> Sequence[Found]:
    """Its step's time, beside whatever else the machine did."""
    del preset
    return [(RUN, [0], [run.result.step_ms])]


def tasks(runs: Sequence[Trained], models: Mapping[str, Path], preset: Preset) -> Sequence[Task]:
    """A plan of each cell on H100, at the same B and at the same number of blocks kept, and one
    race of all on a CPU core."""
    del models
    values, trained = preset.values, {run.cell.name for run in runs}
    blocks = [size for size in sizes(values) if f"B = {size}" in trained]
    dense = [cell for cell in ratio.cells(values) if cell.name in DENSE]
    width, hidden = values["moe_ffn_hidden_size"], values["hidden_size"]
    found = [Task(SINGLE, 0, "step_times:cpu_experts", {
        "rows": values["micro_batch_size"] * values["seq_length"] * values["moe_router_topk"],
        "hidden": hidden, "neurons": width, "experts": values["num_experts"],
        "ratio": values["mone_neuron_ratio"], "blocks": blocks,
        "dense": [_width(cell, width) for cell in dense],
        "seconds": preset.measuring["seconds"],
    })]  # fmt: skip
    if "plan" not in preset.measuring:
        return found

    def planned(cell: str, config: str, same: str, share: str) -> Task:
        layouts = {PLANNED: same, PLANNED_SHARE: share}
        asked = {"config": config, "layouts": layouts, **preset.measuring["plan"]}
        return Task(cell, 0, "step_times:planned_steps", asked)

    for size in blocks:
        wide = size * _PLANNED_NEURONS // width if size > 1 else 1
        layouts = [f"mone_neuron_block={block}" for block in (size, wide)]
        found.append(planned(f"B = {size}", _CONFIG, *layouts))
    for cell in dense:
        layout = f"moe_ffn_hidden_size={_width(cell, width) * _PLANNED_NEURONS // width}"
        found.append(planned(cell.name, _DENSE_CONFIG, layout, layout))
    return found


def _width(cell: Cell, width: int) -> int:
    """Neurons of each of its experts."""
    return int(cell.values.get("moe_ffn_hidden_size", width))


def times(results: StudyResults) -> dict[str, dict[str, float]]:
    """What is timed -> cell that was trained -> ms, of those that were."""
    found = {kind: _by_cell(results, of) for kind, of in _STEPS.items()}
    found[_CPU] = {
        **{f"B = {x:.0f}": one.mean for x, one in results.curve(CPU_MONE, SINGLE)},
        **{name: one.mean for name, (_, one) in
           zip(DENSE, results.curve(CPU_DENSE, SINGLE), strict=False)},
    }  # fmt: skip
    trained = {
        kind: {cell: ms for cell, ms in one.items() if results.has(cell)}
        for kind, one in found.items()
    }
    return {kind: one for kind, one in trained.items() if one}


def _by_cell(results: StudyResults, of: str) -> dict[str, float]:
    return {cell: results.curve(of, cell)[0][1].mean for cell in results.who(of)}


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those than which no other is as good in both values and better in one; lower is better.

    Args:
        points: name -> (time, loss).
    """
    return [
        name for name, one in points.items()
        if not any(other != one and other[0] <= one[0] and other[1] <= one[1]
                   for other in points.values())
    ]  # fmt: skip


def _points(results: StudyResults, spent: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    return {name: (ms, results.cell(name).loss.mean) for name, ms in spent.items()}


def findings(results: StudyResults) -> list[str]:
    """Each size against single neurons, what a step takes, and who is on the front of both."""
    others = [cell.name for cell in results.cells if cell.name != SINGLE]
    found = [compared(results, name, SINGLE) for name in others]
    for kind, spent in times(results).items():
        each = ", ".join(f"{name} {ms:,.4g}" for name, ms in spent.items())
        best = "; ".join(front(_points(results, spent)))
        found.append(
            f"{kind}, ms: {each}. None is both faster and of lower mean loss than: {best}."
        )
    return [*found, *use(results, [SINGLE, *others])]


def sections(results: StudyResults) -> Sequence[Section]:
    """Time beside loss."""
    spent = times(results)
    if not spent:
        return []
    load = results.curve(LOAD, SINGLE)
    beside = f" under a load of {load[0][1].mean:.1f} processes on the machine" if load else ""
    return [Section("Time against loss", [
        "Planned: a step of 128 H100 with the published 30B-A3B shape (experts of 768 neurons, "
        "r = 1/4), by megatron-mone plan; not run on a GPU yet. Its blocks are of B neurons as "
        "here, or three times as wide, so that a row keeps as many blocks as here.",
        "Measured: the experts of one layer of this size, forward and backward in fp32 on one CPU "
        f"core, all in rounds{beside}; dense experts by torch's grouped_mm. A run's step is of the "
        "whole model and was taken beside other runs: it shows no more than whether the experts' "
        "time matters there.",
        "In the pictures a line joins those than which no other is both faster and better.",
    ], figure=(partial(_pareto, results, spent), "Mean loss, 95% interval, against time."),
        table=(("cell", "loss", *(f"{kind}, ms" for kind in spent),
                *(f"{kind}, experts' part" for kind in _STEPS), "step of a run, ms"),
               [_row(results, spent, cell.name) for cell in results.cells]))]  # fmt: skip


def _row(results: StudyResults, spent: Mapping[str, Mapping[str, float]], name: str) -> list[str]:
    parts = [_by_cell(results, experts_of(of)) for of in _STEPS.values()]
    columns = [*spent.values(), *parts, _by_cell(results, RUN)]
    return [
        name, interval(results.cell(name).loss, ".4f"),
        *(f"{one[name]:,.4g}" if name in one else "" for one in columns),
    ]  # fmt: skip


def _pareto(results: StudyResults, spent: Mapping[str, Mapping[str, float]]) -> Figure:
    figure, panels = plt.subplots(
        1, len(spent), figsize=(4.2 * len(spent), 4), sharey=True, squeeze=False
    )
    for axes, (kind, one) in zip(panels[0], spent.items(), strict=True):
        points = _points(results, one)
        for name, (ms, loss) in points.items():
            colour = "#0072B2" if name in DENSE else "#D55E00"
            half = results.cell(name).loss.half_width or 0.0
            axes.errorbar(ms, loss, yerr=half, fmt="o", color=colour, markersize=5, capsize=2)
            axes.annotate(name, (ms, loss), fontsize=7, xytext=(4, 4), textcoords="offset points")
        best = sorted(points[name] for name in front(points))
        axes.plot([ms for ms, _ in best], [loss for _, loss in best], color="#666666", zorder=0)
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("ms")
    panels[0][0].set_ylabel("validation loss, nats a token")
    figure.tight_layout()
    return figure


STUDY = Study(
    name="block",
    question="What does choosing neurons in blocks of B cost in loss, at a fixed share kept, and "
    "what does it save in time?",
    presets={
        "tiny": Preset(
            small.training(small.TINY_STEPS), seeds=2, only=(SINGLE, "B = 32"),
            measuring={"seconds": 1.0},
        ),
        "cpu": Preset(small.training(small.CPU_STEPS), seeds=4, measuring=_MEASURING),
        **{
            name: _on_gpus(preset)
            for name, preset in {**large.PRESETS, **large.largest()}.items()
        },
    },
    cells=cells,
    reference=SINGLE,
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens.",
        "No GPU has run this: times on H100 are the planner's, of another shape than the one whose "
        "loss is shown, whose experts have a third of its neurons.",
        "The CPU's kernels work entry by entry where B is no multiple of 16: their times say "
        "nothing of a GPU's.",
        "Who is on a front is by means: see the intervals.",
    ),
    read=read,
    tasks=tasks,
    sections=sections,
)  # fmt: skip
