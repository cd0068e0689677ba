"""Curves of a plan and of a search: scaling, sweeps, time against memory. Draws; writes nothing.

Each function takes a checked plan or search (plan_document.py) and returns a figure, or None where
there is nothing to draw. A hollow mark needs more memory than the device has.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from megatron_mone.planning.plan_document import Plan, RatioPoint, ScalingPoint, Search
from megatron_mone.reporting.plan.plots import LIMIT_COLOUR, WHOLE
from megatron_mone.reporting.plan.view import over_limit, time
from megatron_mone.reporting.profile.plots import RUN_COLOURS, SETTINGS, WIDTH
from megatron_mone.reporting.profile.tables import MOST_ROWS
from megatron_mone.reporting.profile.view import name_of

_GREY = "#8A8A8A"
Points = list[tuple[float, float, bool]]
"""x, y, whether it fits."""


def scaling(plan: Plan) -> Figure | None:
    """tokens/s of a GPU by number of GPUs, and the first model's over each other's."""
    if not plan.scaling:
        return None
    models, points = plan.models, sorted(plan.scaling, key=lambda one: one.gpus)
    sizes = [point.gpus for point in points]
    compared = len(models) > 1
    with plt.rc_context({**SETTINGS, "font.size": 9}):
        figure, panels = plt.subplots(1, 1 + compared, figsize=(WIDTH, 3.6), squeeze=False,
                                      layout="constrained")  # fmt: skip
        rates = panels[0][0]
        for i, model in enumerate(models):
            _curve(rates, rate_points(points, model.name), _colour(i))
        rates.set_ylabel("tokens / s of one GPU")
        rates.yaxis.set_major_formatter(WHOLE)
        rates.set_ylim(0, 1.08 * rates.get_ylim()[1])
        if compared:
            _ratio_panel(panels[0][1], plan, points)
        for panel in panels[0]:
            panel.set_xlabel("GPUs")
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=35, ha="right")
            panel.minorticks_off()
        _legend(figure, [(name_of(model), _colour(i)) for i, model in enumerate(models)])
    return figure


def rate_points(points: Sequence[ScalingPoint], name: str) -> Points:
    """(GPUs, tokens/s of one GPU, fits) of one model, where it was planned."""
    found = [(point.gpus, point.models.get(name)) for point in points]
    return [(gpus, at.tokens_per_s_per_gpu, at.fits) for gpus, at in found if at is not None]


def ratio_points(points: Sequence[ScalingPoint], first: str, other: str) -> Points:
    """(GPUs, tokens/s of `first` over those of `other`, both fit), where both were planned."""
    ours = {gpus: (rate, fits) for gpus, rate, fits in rate_points(points, first)}
    return [
        (gpus, ours[gpus][0] / rate, ours[gpus][1] and fits)
        for gpus, rate, fits in rate_points(points, other)
        if gpus in ours
    ]


def ratio_sweep(plan: Plan) -> Figure | None:
    """Step, expert time and peak memory by the share r of neurons kept."""
    entries = sorted(plan.ratio_sweep, key=lambda entry: entry.r)
    if not entries:
        return None
    panels = {"step_ms": "ms a step", "expert_ms": "ms of the experts", "peak_gib": "peak, GiB"}
    with plt.rc_context({**SETTINGS, "font.size": 9}):
        figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.0), layout="constrained")
        for panel, (field, label) in zip(axes, panels.items(), strict=True):
            _curve(panel, _swept(plan, entries, field), RUN_COLOURS[0])
            panel.set_xscale("log", base=2)
            panel.set_xticks([entry.r for entry in entries], [_r(e.r) for e in entries])
            panel.minorticks_off()
            panel.set(xlabel="r, share of neurons kept", title=label)
        _references(plan, axes[0], axes[2])
        for panel in axes:
            _from_zero(panel)
        compared = [(name_of(m), _colour(i)) for i, m in enumerate(plan.models) if i]
        _legend(figure, [(name_of(plan.models[0]), RUN_COLOURS[0])],
                [*compared, ("device", LIMIT_COLOUR)])  # fmt: skip
    return figure


def expert_sweep(plan: Plan) -> Figure | None:
    """Step, expert time, exposed communication and memory by experts a token x neurons of each."""
    entries = plan.expert_sweep
    if not entries:
        return None
    panels = {
        "step_ms": "ms a step",
        "expert_ms": "ms of the experts",
        "exposed_comm_ms": "ms of exposed communication",
        "peak_gib": "peak, GiB",
    }
    labels = [f"{entry.topk} x {entry.neurons:,}" for entry in entries]
    with plt.rc_context({**SETTINGS, "axes.grid": False, "font.size": 9}):
        height = 0.9 + 2 * (0.5 + 0.24 * len(entries))
        figure, axes = plt.subplots(2, 2, figsize=(WIDTH, height), sharey=True,
                                    layout="constrained")  # fmt: skip
        for panel, (field, label) in zip(axes.flat, panels.items(), strict=True):
            values = [getattr(entry, field) for entry in entries]
            colours = ["white" if over_limit(plan, e.peak_gib) else RUN_COLOURS[0]
                       for e in entries]  # fmt: skip
            bars = panel.barh(range(len(entries)), values, color=colours,
                              edgecolor=RUN_COLOURS[0])  # fmt: skip
            panel.bar_label(bars, [*map(time, values)], padding=3, fontsize=8)
            panel.set_xlim(0, 1.2 * max(*values, 1e-9))
            panel.xaxis.set_major_formatter(WHOLE)
            panel.set_title(label, fontsize=10, loc="left")
        axes[0, 0].set_yticks(range(len(entries)), labels)
        axes[0, 0].set_ylim(len(entries) - 0.5, -0.5)
        for panel in axes[:, 0]:
            panel.set_ylabel("experts x neurons")
    return figure


def candidates(search: Search) -> Figure | None:
    """Step time against memory of every layout, the Pareto front, the limit and the best."""
    found, limit = search.candidates, search.cluster.memory_gib
    if not found:
        return None
    front = sorted((one for one in found if one.pareto), key=lambda one: one.peak_gib)
    with plt.rc_context({**SETTINGS, "font.size": 9}):
        figure, axes = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
        axes.plot([one.peak_gib for one in front], [one.step_ms for one in front],
                  color=RUN_COLOURS[0], linewidth=1.6, drawstyle="steps-post")  # fmt: skip
        for one in found:
            colour = RUN_COLOURS[0] if one.pareto else _GREY
            axes.plot([one.peak_gib], [one.step_ms], marker="o", markersize=5.5, color=colour,
                      markerfacecolor=colour if one.fits else "white")  # fmt: skip
        axes.axvline(limit, color=LIMIT_COLOUR, linewidth=1.4, linestyle="--")
        axes.set(xlabel="peak memory of a rank (GiB)", ylabel="ms a step")
        axes.set_xlim(0, 1.06 * max(limit, *(one.peak_gib for one in found)))
        axes.yaxis.set_major_formatter(WHOLE)
        axes.margins(y=0.1)
        figure.legend(
            [_mark(_GREY), _mark(_GREY, hollow=True), _mark(RUN_COLOURS[0], "-"),
             Line2D([], [], color=LIMIT_COLOUR, linestyle="--")],
            ["fits", "does not fit", "Pareto front", "device's memory"],
            loc="outside lower center", ncols=4, frameon=False,
        )  # fmt: skip
        figure.draw_without_rendering()  # the layout must be known for numbers to avoid each other
        _name_best(axes, search)
    return figure


def _name_best(axes: Axes, search: Search) -> None:
    """The best layouts' numbers beside their marks, where they cover no mark or number of these."""
    best = search.best_candidates()[:MOST_ROWS]
    taken: list[Bbox] = []
    for one in best:
        x, y = axes.transData.transform((one.peak_gib, one.step_ms))
        taken.append(Bbox.from_extents(x - 6, y - 6, x + 6, y + 6))
    for number, one in enumerate(best, 1):
        for away in product(range(11, 67, 11), ((0, -1), (1, 0), (-1, 0), (0, 1))):
            distance, (right, up) = away
            label = axes.annotate(str(number), (one.peak_gib, one.step_ms),
                                  xytext=(distance * right, distance * up), fontsize=9,
                                  textcoords="offset points", ha="center", va="center",
                                  fontweight="bold")  # fmt: skip
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _ratio_panel(axes: Axes, plan: Plan, points: Sequence[ScalingPoint]) -> None:
    first = plan.models[0]
    for i, other in enumerate(plan.models[1:], 1):
        _curve(axes, ratio_points(points, first.name, other.name), _colour(i))
    axes.axhline(1.0, color="#444444", linewidth=1, linestyle=":")
    axes.set_ylabel(f"{name_of(first)}'s tokens / s over the other's")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(high, 1.1) + 0.03)


def _references(plan: Plan, step: Axes, memory: Axes) -> None:
    """What the other models take, and the device's limit."""
    for i, model in enumerate(plan.models[1:], 1):
        style: dict[str, Any] = {"color": _colour(i), "linewidth": 1.2, "linestyle": "--"}
        step.axhline(model.step_ms, **style)
        memory.axhline(model.memory_gib.peak, **style)
    memory.axhline(plan.cluster.memory_gib, color=LIMIT_COLOUR, linewidth=1.4,
                   linestyle="--")  # fmt: skip


def _swept(plan: Plan, entries: Sequence[RatioPoint], field: str) -> Points:
    return [(e.r, getattr(e, field), not over_limit(plan, e.peak_gib)) for e in entries]


def _curve(axes: Axes, points: Points, colour: str) -> None:
    """A line with a mark a point, hollow where it does not fit."""
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, linewidth=2)
    for x, y, fits in points:
        axes.plot([x], [y], marker="o", markersize=5.5, color=colour,
                  markerfacecolor=colour if fits else "white")  # fmt: skip


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(WHOLE)


def _r(value: float) -> str:
    """1/4 where it is a fraction of one, else a decimal."""
    inverse = round(1 / value)
    return f"1/{inverse}" if inverse > 1 and abs(inverse * value - 1) < 1e-3 else f"{value:.3g}"


def _mark(colour: str, line: str = "", *, hollow: bool = False) -> Line2D:
    return Line2D([], [], color=colour, linestyle=line, marker="o",
                  markerfacecolor="white" if hollow else colour)  # fmt: skip


def _legend(
    figure: Figure,
    curves: Sequence[tuple[str, str]],
    references: Sequence[tuple[str, str]] = (),
) -> None:
    """Names and colours of curves, and of the dashed lines they are held against."""
    handles = [_mark(colour, "-") for _, colour in curves]
    handles += [Line2D([], [], color=colour, linestyle="--") for _, colour in references]
    names = [*(name for name, _ in (*curves, *references)), "does not fit"]
    figure.legend([*handles, _mark(_GREY, hollow=True)], names, loc="outside lower center",
                  ncols=min(6, len(names)), frameon=False)  # fmt: skip


def _colour(index: int) -> str:
    """Of a model, by its place among those compared."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]
