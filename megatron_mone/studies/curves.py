"""A figure of what was measured: a line a cell with its 95% interval."""

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from megatron_mone.studies.document import StudyResults


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
        points = results.curve(of, cell)
        if not points:
            continue
        at, found = [x for x, _ in points], [one for _, one in points]
        (line,) = axes.plot(at, [one.mean for one in found], marker="o", markersize=3, label=label)
        if all(one.half_width is not None for one in found):
            low, high = [one.low for one in found], [one.high for one in found]
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure
