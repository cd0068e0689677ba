"""A run, or a sweep, as one page: its table, losses by step, bars of step time and loss, and what
benchmarks its checkpoints scored."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_mone.reporting.page.events import Curve
from megatron_mone.reporting.page.html import Page
from megatron_mone.reporting.page.plots import SETTINGS, save
from megatron_mone.reporting.page.scores import add_scores, columns_of
from megatron_mone.reporting.sweep.table import Row, cells, numbers

_LEGEND_COLUMNS = 3


def sweep_page(name: str, rows: Sequence[Row], plots: Path) -> str:
    """The page as HTML.

    Args:
        name: of the sweep.
        rows: of its table, at least one.
        plots: folder that gets each picture as PNG and SVG too; made where it is not there.

    Raises:
        OSError: a picture cannot be written.
    """
    page = Page(name)
    page.table(*cells(rows))
    page.paragraph("Losses in nats per token; / first: over the first row's; -: not recorded.")
    plots.mkdir(parents=True, exist_ok=True)
    if any(row.measured.training_curve for row in rows):
        png = save(loss_curves(rows), plots / "losses")
        page.figure(png, "Training loss (left) and validation loss (right) by step.")
    if any(row.measured.step_ms or row.measured.validation_loss for row in rows):
        png = save(bars(rows), plots / "bars")
        page.figure(png, "Median step time and last validation loss of each case.")
    if any(row.evaluations for row in rows):
        page.heading("Benchmarks")
        # The one case of a run that is no sweep needs no name.
        names = [row.label if row.values else "" for row in rows]
        add_scores(page, columns_of(dict(zip(names, (r.evaluations for r in rows), strict=True))))
    return page.render()


def loss_curves(rows: Sequence[Row]) -> Figure:
    """Training and validation loss by step, one line a case, coloured in the table's order."""
    with plt.rc_context(SETTINGS):
        lines = math.ceil(len(rows) / _LEGEND_COLUMNS)
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 3.6 + 0.22 * lines), sharex=True, sharey=True
        )
        for row, colour in zip(rows, _colours(len(rows)), strict=True):
            _curve(left, row.measured.training_curve, colour, row.label, marker=None)
            _curve(right, row.measured.validation_curve, colour, row.label, marker="o")
        left.set(xlabel="step", ylabel="training loss (nats / token)")
        right.set(xlabel="step", ylabel="validation loss (nats / token)")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        handles, labels = left.get_legend_handles_labels()
        share = 0.24 * lines / (3.6 + 0.22 * lines)
        figure.tight_layout(rect=(0, share, 1, 1))
        figure.legend(
            handles, labels, loc="lower center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=9
        )
    return figure


def bars(rows: Sequence[Row]) -> Figure:
    """Horizontal bars of step time (ms) and validation loss; no bar where a number is missing."""
    found = numbers(rows)
    panels = {"median ms / step": "step_ms", "validation loss (nats / token)": "validation_loss"}
    with plt.rc_context({**SETTINGS, "axes.grid": False, "font.size": 10}):
        figure, axes = plt.subplots(1, 2, figsize=(9, 1.2 + 0.3 * len(rows)), sharey=True)
        for panel, (title, key) in zip(axes, panels.items(), strict=True):
            values = [one[key] for one in found]
            panel.barh(
                range(len(rows)), [value or 0.0 for value in values], color=_colours(len(rows))
            )
            panel.set_yticks(range(len(rows)), [row.label for row in rows])
            panel.set_title(title, fontsize=10)
            top = max((value for value in values if value is not None), default=0.0) or 1.0
            panel.set_xlim(0, 1.2 * top)
            for place, value in enumerate(values):
                text = "-" if value is None else f"{value:.4g}"
                panel.text((value or 0.0) + 0.02 * top, place, text, va="center", fontsize=9)
        axes[0].invert_yaxis()  # shared: the first row on top
        figure.tight_layout()
    return figure


def _curve(axes: Axes, curve: Curve, colour: tuple, label: str, marker: str | None) -> None:
    steps = [step for step, _ in curve]
    axes.plot(
        steps, [value for _, value in curve], color=colour, label=label, marker=marker,
        markersize=4, linewidth=1.6,
    )  # fmt: skip


def _colours(count: int) -> list[tuple]:
    """From dark to light in the table's order; the lightest end would not show on white."""
    return [plt.colormaps["viridis"](0.88 * i / max(1, count - 1)) for i in range(count)]
