"""Bars of a plan: memory of every stage, parts of the step. Draws; writes nothing.

Each function takes a checked plan or search (plan_document.py) and returns a figure, or None where
there is nothing to draw. Colours mean the same as in a profile's report.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from megatron_mone.common.phases import PHASES
from megatron_mone.planning.cost.rank_memory import ORDER
from megatron_mone.planning.plan_document import Plan, PlannedModel, Search
from megatron_mone.reporting.plan.view import layout_text, over_limit
from megatron_mone.reporting.profile.plots import PHASE_COLOURS, SETTINGS, WIDTH, ink, write_inside
from megatron_mone.reporting.profile.resource_plots import KIND_COLOURS
from megatron_mone.reporting.profile.view import milliseconds, name_of

MEMORY_COLOURS = {
    **{part: KIND_COLOURS[part] for part in ("weights", "gradients", "optimizer", "activations")},
    "transient": KIND_COLOURS["temporaries"], "buffers": KIND_COLOURS["communication"],
    "context": "#4A4A4A", "fragmentation": "#C9C9C9",
}  # fmt: skip
PART_COLOURS = {
    "compute": "#0072B2",  # where it is not split into phases
    "expert parallel": PHASE_COLOURS["dispatch"],
    "expert tensor parallel": PHASE_COLOURS["combine"],
    "tensor parallel": PHASE_COLOURS["exposed communication"],
    "context parallel": "#A98BA9",
    "host copies": "#8C6D31",
    "bubble": PHASE_COLOURS["pipeline bubble"],
    "data parallel": PHASE_COLOURS["grad reduce"],
    "optimizer": PHASE_COLOURS["optimizer"],
}
"""Of `parts_ms`; all but compute and the optimizer are waiting, and hatched."""
LIMIT_COLOUR = "#B2182B"
WHOLE = FuncFormatter(lambda value, _: f"{value:,.10g}")
"""Ticks with separators between thousands."""
_UNKNOWN = "#D9D9D9"
_HATCH = "//////"
_THICK = 0.78  # of a bar, in rows
_MOST_BARS = 12  # of the best layouts of a search
_TALLEST = 8.6  # inches, to be printed on one sheet


class Part(NamedTuple):
    """One segment of a stacked bar."""

    name: str
    size: float
    colour: str
    hatched: bool = False


def memory_bars(plan: Plan) -> Figure:
    """A panel a model, a stacked bar a stage in GiB, and the device's limit."""
    models, limit = plan.models, plan.cluster.memory_gib
    columns = min(2, len(models))
    panel_rows = math.ceil(len(models) / columns)
    stages = max(len(model.stages) for model in models)
    row = min(0.36, (_TALLEST / panel_rows - 1.0) / stages)
    height = panel_rows * (0.75 + row * stages) + 0.4
    longest = max(limit, *(s.memory_gib.peak for m in models for s in m.stages))
    with plt.rc_context({**SETTINGS, "axes.grid": False, "font.size": 9}):
        figure, panels = plt.subplots(panel_rows, columns, figsize=(WIDTH, height),
                                      squeeze=False, layout="constrained")  # fmt: skip
        for panel, model in zip(panels.flat, models, strict=False):
            panel.set_xlim(0, 1.17 * longest)
            _memory_panel(panel, model, plan, min(8.0, 62 * row))
        for panel in panels.flat[len(models) :]:
            panel.set_visible(False)
        _legend(figure, [Part(part, 1.0, MEMORY_COLOURS[part]) for part in ORDER], 8)
    return figure


def parts_bars(plan: Plan) -> Figure:
    """A stacked bar a model: compute by phase, exposed communication by group, and the rest."""
    models = plan.models
    return _time_bars([(name_of(model), model_parts(model)) for model in models])


def best_bars(search: Search) -> Figure | None:
    """A stacked bar for each of the first of the best layouts; None where there is none."""
    rows = [
        (f"{number}: {layout_text(one.layout, batch=False)}", parts_of(one.parts_ms))
        for number, one in enumerate(search.best_candidates()[:_MOST_BARS], 1)
    ]
    return _time_bars(rows) if rows else None


def model_parts(model: PlannedModel) -> list[Part]:
    """The parts of a model's step, its compute divided into phases; ms."""
    phases = model.phases_ms
    compute = [Part(p, phases[p], PHASE_COLOURS[p]) for p in PHASES if phases.get(p)]
    rest = [part for part in parts_of(model.parts_ms) if part.name != "compute" or not compute]
    return [*compute, *rest]


def parts_of(parts_ms: dict[str, float]) -> list[Part]:
    """`parts_ms` in the order in which it is stacked; parts of 0 ms are left out."""
    known = [name for name in PART_COLOURS if name in parts_ms]
    names = known + sorted(parts_ms.keys() - PART_COLOURS.keys())
    return [
        Part(name, parts_ms[name], PART_COLOURS.get(name, _UNKNOWN),
             name not in ("compute", "optimizer"))
        for name in names
        if parts_ms[name] > 0
    ]  # fmt: skip


def _stack(axes: Axes, row: int, parts: Sequence[Part]) -> float:
    """Draws one stacked bar; returns its length."""
    left = 0.0
    for part in parts:
        axes.barh(row, part.size, left=left, height=_THICK, color=part.colour, edgecolor="white",
                  linewidth=0.5, hatch=_HATCH if part.hatched else None)  # fmt: skip
        left += part.size
    return left


def _time_bars(rows: Sequence[tuple[str, list[Part]]]) -> Figure:
    named: dict[str, Part] = {part.name: part for _, parts in rows for part in parts}
    longest = max(sum(part.size for part in parts) for _, parts in rows)
    with plt.rc_context({**SETTINGS, "axes.grid": False}):
        height = 0.95 + 0.85 * len(rows) + 0.22 * math.ceil(len(named) / 6)
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        axes.set_xlim(0, 1.24 * longest)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("ms a step, on the stage that ends last")
        axes.xaxis.set_major_formatter(WHOLE)
        _legend(figure, _in_order(named.values()), 6)
        figure.draw_without_rendering()  # the layout must be known for words to be fitted
        for row, (_, parts) in enumerate(rows):
            total = _stack(axes, row, parts)
            _name_parts(axes, row, parts)
            axes.text(total + 0.008 * longest, row, _total(row, rows), va="center",
                      fontsize=9.5, fontweight="bold")  # fmt: skip
    return figure


def _total(row: int, rows: Sequence[tuple[str, list[Part]]]) -> str:
    """Each bar's length; the first one's ratio to the second, where there are but two."""
    totals = [sum(part.size for part in parts) for _, parts in rows]
    text = f"{milliseconds(totals[row])} ms"
    if row == 0 and len(rows) == 2:
        text += f"\n{totals[0] / totals[1]:.2f} of {rows[1][0][:16]}"
    return text


def _memory_panel(axes: Axes, model: PlannedModel, plan: Plan, size: float) -> None:
    limit = plan.cluster.memory_gib
    stages = model.stages
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.set_yticks(range(len(stages)), [f"stage {stage.stage}" for stage in stages])
    axes.tick_params(axis="y", length=0, labelsize=size)
    for stage in stages:
        memory = stage.memory_gib
        parts = [
            Part(part, size, MEMORY_COLOURS[part]) for part, size in memory.parts.items() if size
        ]
        _stack(axes, stage.stage, parts)
        over = over_limit(plan, memory.peak)
        axes.text(0.995 * axes.get_xlim()[1], stage.stage, f"{memory.peak:,.1f}",
                  va="center", ha="right", fontsize=size, fontweight="bold",
                  color=LIMIT_COLOUR if over else "black")  # fmt: skip
    axes.axvline(limit, color=LIMIT_COLOUR, linewidth=1.4, linestyle="--")
    axes.set_title(f"{name_of(model)}, device {limit:,.1f} GiB (dashed)", fontsize=10, loc="left")
    axes.set_xlabel("GiB")


def _name_parts(axes: Axes, row: int, parts: Sequence[Part]) -> None:
    """Each part's name and ms inside its segment: upright if that fits, else turned, else not."""
    low, high = axes.get_ylim()
    tall = _THICK * axes.get_window_extent().height / abs(high - low)
    per_ms = axes.get_window_extent().width / (axes.get_xlim()[1] - axes.get_xlim()[0])
    left = 0.0
    for part in parts:
        narrow, ms = part.name.replace(" ", "\n"), milliseconds(part.size)
        texts = ((f"{part.name}\n{ms}", 0, 8), (f"{narrow}\n{ms}", 0, 8),
                 (part.name, 90, 8), (narrow, 90, 8))  # fmt: skip
        # on a hatched segment a text needs a ground of its own
        ground = {"facecolor": part.colour, "edgecolor": "none", "pad": 0.6}
        write_inside(axes, (left + part.size / 2, row), (per_ms * part.size, tall), texts,
                     color=ink(part.colour), bbox=ground if part.hatched else None)  # fmt: skip
        left += part.size


def _in_order(parts: Iterable[Part]) -> list[Part]:
    """Phases first, then parts, whichever model brought them."""
    order = [*(phase for phase in PHASES if phase not in PART_COLOURS), *PART_COLOURS]
    places = {name: place for place, name in enumerate(order)}
    return sorted(parts, key=lambda part: places.get(part.name, len(order)))


def _legend(figure: Figure, parts: Sequence[Part], columns: int) -> None:
    swatches = [
        Patch(facecolor=part.colour, edgecolor="white", linewidth=0.5,
              hatch=_HATCH if part.hatched else None)
        for part in parts
    ]  # fmt: skip
    figure.legend(swatches, [part.name for part in parts], loc="outside lower center",
                  ncols=min(columns, len(parts)), frameon=False, fontsize=8.5,
                  handlelength=1.4, columnspacing=1.2)  # fmt: skip
