"""A calibration for people: a table, and measured against predicted as a plot.

May touch: the two files of the plot.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_mone.planning.fitting.calibration_result import COLUMNS, Calibration, FittedPhase
from megatron_mone.reporting.page.plots import COLOURS, SETTINGS, save

_WORDS = {
    "fitted": "fitted to all",
    "without_run": "fitted to other runs",
    "without_phase": "fitted to other phases",
}
_MARKERS = "os^Dv"
_OTHERS = tuple(COLOURS.values())


def table(found: Calibration) -> str:
    """Every pass of every phase, the whole steps, and what was left out; ms and errors."""
    return "\n".join(_lines(found))


def _lines(found: Calibration) -> Iterator[str]:
    yield f"{'':32}{'measured':>9}" + "".join(f"{_WORDS[column]:>24}" for column in COLUMNS)
    for one in found.phases:
        values = "".join(_beside(one.measured, getattr(one, column)) for column in COLUMNS)
        yield f"{one.run:11.11}{one.phase + ' ' + one.pass_:21}{1e3 * one.measured:9.1f}{values}"
    for key, words in (
        ("median", "median error"), ("worst", "worst error"), ("of_time", "off by, of their time"),
    ):  # fmt: skip
        cells = ""
        for column in COLUMNS:
            summary = found.summary(column)
            cells += f"{'-' if summary is None else f'{summary[key]:.1%}':>24}"
        yield f"{words:41}{cells}"
    yield ""
    yield f"{'whole step':32}{'measured':>9}" + "".join(f"{_WORDS[c]:>24}" for c in COLUMNS[:2])
    for step in found.steps:
        values = _beside(step.measured, step.fitted) + _beside(step.measured, step.without_run)
        covered = f"{step.covered:.0%} of it fitted"
        yield f"{step.run:11.11}{covered:21}{1e3 * step.measured:9.1f}{values}"
    yield ""
    yield f"{'communication, waits included':32}{'measured':>9}{'by the cluster file':>24}"
    for one_kind in found.communication:
        value = _beside(one_kind.measured, one_kind.predicted)
        name = f"{one_kind.run:11.11}{one_kind.collective:21}"
        yield f"{name}{1e3 * one_kind.measured:9.1f}{value}"
    yield ""
    for words in found.left_out:
        yield f"left out: {words}"
    yield found.efficiency.source


def _beside(measured: float, predicted: float | None) -> str:
    """Milliseconds, and how far they are from what was measured."""
    if predicted is None:
        return f"{'-':>24}"
    error = predicted / measured - 1 if measured else float("inf")
    return f"{1e3 * predicted:15.1f} {error:+8.1%}"


def draw(found: Calibration, stem: Path) -> None:
    """Write STEM.png and STEM.svg.

    Args:
        found: the calibration.
        stem: path without a suffix.
    """
    save(_figure(found), stem)


def _figure(found: Calibration) -> Figure:
    """Predicted against measured ms of every pass: fitted filled, without the run hollow."""
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(6.4, 5.6))
        runs = list(dict.fromkeys(one.run for one in found.phases))
        for place, run in enumerate(runs):
            colour, marker = _OTHERS[place % len(_OTHERS)], _MARKERS[place % len(_MARKERS)]
            points = [one for one in found.phases if one.run == run]
            measured = [1e3 * one.measured for one in points]
            axes.plot(
                measured, [1e3 * one.fitted for one in points], marker, color=colour,
                label=f"{run}, {_WORDS['fitted']}",
            )  # fmt: skip
            held = [(1e3 * p.measured, 1e3 * p.without_run) for p in points if p.without_run]
            if held:
                axes.plot(
                    *zip(*held, strict=True), marker, color=colour, markerfacecolor="none",
                    label=f"{run}, {_WORDS['without_run']}",
                )  # fmt: skip
        _name_the_worst(axes, found)
        low, high = _limits(found)
        axes.plot([low, high], [low, high], color="#444444", linewidth=1, zorder=0)
        axes.fill_between(
            [low, high], [low / 1.25, high / 1.25], [1.25 * low, 1.25 * high], color="#eeeeee",
            zorder=0, label="within a quarter",
        )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.set(xlabel="measured (ms / step)", ylabel="predicted (ms / step)")
        axes.legend(fontsize=9, loc="upper left", frameon=False)
        figure.tight_layout()
    return figure


def _name_the_worst(axes: Axes, found: Calibration) -> None:
    """Name the three phases whose fit is farthest off."""
    worst: dict[str, FittedPhase] = {}
    for one in sorted(found.phases, key=lambda one: -abs(math.log(one.fitted / one.measured))):
        worst.setdefault(one.phase, one)
    for one in list(worst.values())[:3]:
        axes.annotate(
            f"{one.phase} {one.pass_}", (1e3 * one.measured, 1e3 * one.fitted), fontsize=8,
            xytext=(-8, 4), textcoords="offset points", ha="right",
        )  # fmt: skip


def _limits(found: Calibration) -> tuple[float, float]:
    values = [
        1e3 * value
        for one in found.phases
        for value in (one.measured, one.fitted, one.without_run)
        if value
    ]
    return min(values) / 1.5, 1.5 * max(values)
