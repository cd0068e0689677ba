"""Lines of what was measured, each with its 95% interval, and a figure of them."""

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.statistics import Estimate


def line(axes: Axes, points: Sequence[tuple[float, Estimate]], label: str) -> None:
    """Draw (x, estimate) points, with a band where each of them has an interval."""
    at, found = [x for x, _ in points], [one for _, one in points]
    (drawn,) = axes.plot(at, [one.mean for one in found], marker="o", markersize=3, label=label)
    if all(one.half_width is not None for one in found):
        low, high = [one.low for one in found], [one.high for one in found]
        axes.fill_between(at, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)


def measured_curves(
    results: StudyResults, lines: Sequence[tuple[str, str, str]], *, x: str, y: str,
    log_x: bool = False, log_y: bool = False,
) -> Figure:  # fmt: skip
    """Lines of (of, cell, label), each with a band where there are two seeds or more.

    Args:
        results: hold the measures.
        lines: what of whom, and its name in the legend; one that was not measured is left out.
        x: label of what the values are at.
        y: label of the values, with their unit.
        log_x: whether x is drawn in powers.
        log_y: whether y is.
    """
    figure, axes = plt.subplots(figsize=(8, 4))
    for of, cell, label in lines:
        if points := results.curve(of, cell):
            line(axes, points, label)
    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure
