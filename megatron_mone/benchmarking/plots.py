"""The race in four pictures, drawn from the content of results.json."""

from collections import Counter
from collections.abc import Callable, Sequence
from math import nan
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_mone.benchmarking.goals import WORDS
from megatron_mone.benchmarking.summary import Point, fraction
from megatron_mone.kernels.race_results import CellResults, RaceResults
from megatron_mone.reporting.page import plots

# Okabe and Ito's colours: r from all neurons to few.
RATIO_COLOURS = ("#999999", "#56B4E9", "#0072B2", "#009E73", "#D55E00", "#CC79A7")
FORWARD, BOTH, ROOF = "#0072B2", "#D55E00", "#444444"
SETTINGS = {**plots.SETTINGS, "font.size": 10}
Drawing = Callable[[RaceResults, list[Point]], Figure | None]


def ratio_against_rows(results: RaceResults, found: list[Point]) -> Figure | None:
    """Time over the fastest dense peer's against N, a line for each r, a panel a dtype."""
    found = _of_main_shape(found)
    if len({point.config.tokens for point in found}) < 2:
        return None

    def draw(panel: Axes, mine: list[Point]) -> None:
        ratios = sorted({point.ratio for point in mine}, reverse=True)
        for colour, ratio in zip(RATIO_COLOURS, ratios, strict=False):
            line = sorted(
                (p.config.tokens, p.forward_backward, p.limit) for p in mine if p.ratio == ratio
            )
            rows, times, limits = zip(*line, strict=True)
            panel.plot(rows, times, color=colour, marker="o", markersize=4,
                       label=f"r = {fraction(ratio)}")  # fmt: skip
            panel.plot(rows, limits, color=colour, linewidth=1, linestyle=":")
        panel.plot([], [], color=ROOF, linewidth=1, linestyle=":", label="by roofline")
        _even(panel)
        panel.set_xscale("log", base=2)
        panel.set(title=f"{mine[0].config.dtype}, {_shape(mine)}", xlabel="N, routed rows")

    return _panels(found, draw, "forward + backward time / fastest dense")


def ratio_against_share(results: RaceResults, found: list[Point]) -> Figure | None:
    """Time over the fastest dense peer's against r at the largest N, with the roofline's."""

    def draw(panel: Axes, mine: list[Point]) -> None:
        shares = _share_axis(panel, mine)
        for name, colour, values in (
            ("forward", FORWARD, [point.forward for point in mine]),
            ("forward + backward", BOTH, [point.forward_backward for point in mine]),
        ):
            panel.plot(shares, values, color=colour, marker="o", markersize=4, label=name)
        for phase, colour in zip(WORDS, (FORWARD, BOTH), strict=True):
            goals = [point.goals[phase] for point in mine]
            marks = [nan if goal is None else goal for goal in goals]
            label = f"goal, {WORDS[phase]}" if any(goals) else None
            panel.plot(shares, marks, color=colour, linestyle="", marker="_", markersize=12,
                       label=label)  # fmt: skip
        panel.plot(shares, [point.limit for point in mine], color=ROOF, linestyle=":",
                   label="forward + backward by roofline")  # fmt: skip
        _even(panel)

    return _panels(_largest(found), draw, "time / fastest dense")


def time_and_roofline(results: RaceResults, found: list[Point]) -> Figure | None:
    """Bars of forward + backward time at the largest N, each with its roofline."""

    def draw(panel: Axes, mine: list[Point]) -> None:
        rows = _cell_of(mine, results).agreeing
        names = [
            row.name if row.ratio is None else f"{row.name}, r = {fraction(row.ratio)}"
            for row in rows
        ]
        times = [row.forward_backward_ms for row in rows]
        below = [row.forward_backward_ms - row.forward_backward_ms_p10 for row in rows]
        above = [row.forward_backward_ms_p90 - row.forward_backward_ms for row in rows]
        colours = ["#999999" if row.dense else BOTH for row in rows]
        panel.barh(names, times, color=colours, xerr=[below, above],
                   error_kw={"ecolor": ROOF, "linewidth": 1})  # fmt: skip
        limits = [row.limit_forward_backward_ms for row in rows]
        panel.plot(limits, names, linestyle="", marker="|", markersize=9, color="black",
                   label="roofline of this machine")  # fmt: skip
        panel.invert_yaxis()
        config = mine[0].config
        panel.set_title(f"{config.dtype}, N {config.tokens}", fontsize=9)
        panel.set_xlabel("forward + backward (ms): median, p10 to p90")

    smaller = {**SETTINGS, "axes.grid": False, "font.size": 8}
    return _panels(_largest(found), draw, "", height=4.6, share=False, settings=smaller)


def memory_against_share(results: RaceResults, found: list[Point]) -> Figure | None:
    """Bytes kept for the backward against r at the largest N, MoNE's and the dense peers'."""

    def draw(panel: Axes, mine: list[Point]) -> None:
        shares = _share_axis(panel, mine)
        panel.plot(shares, [p.mone.saved_bytes / 2**20 for p in mine], color=BOTH, marker="o",
                   markersize=4, label="MoNE")  # fmt: skip
        rows = _cell_of(mine, results).agreeing
        dense = [row.saved_bytes / 2**20 for row in rows if row.dense]
        panel.axhspan(min(dense), max(dense), color="#999999", alpha=0.3, label="dense peers")
        panel.axhline(min(dense), color="#999999")
        panel.set_ylim(bottom=0)

    return _panels(_largest(found), draw, "kept for the backward (MiB)", share=False)


PLOTS: tuple[tuple[str, Drawing, str], ...] = (
    ("ratio_against_rows", ratio_against_rows,
     "Forward + backward of the fastest MoNE backend over the fastest dense peer, against the "
     "number of routed rows; dotted: what the roofline allows."),
    ("ratio_against_share", ratio_against_share,
     "The same against the share of neurons kept, at the largest number of rows, with the goals "
     "as bars."),
    ("time_and_roofline", time_and_roofline,
     "Time of every implementation, and the least that the measured peaks allow."),
    ("memory_against_share", memory_against_share,
     "Memory kept for the backward beside inputs and weights, against the share of neurons kept."),
)  # fmt: skip


def _of_main_shape(found: Sequence[Point]) -> list[Point]:
    """Balanced points of the shape that has most of them."""
    balanced = [point for point in found if point.config.routing == "balanced"] or list(found)
    if not balanced:
        return []
    main = Counter(_key(point) for point in balanced).most_common(1)[0][0]
    return [point for point in balanced if _key(point) == main]


def _largest(found: Sequence[Point]) -> list[Point]:
    """Points of the main shape at the largest N of each dtype."""
    main = _of_main_shape(found)
    most = {
        dtype: max(p.config.tokens for p in main if p.config.dtype == dtype)
        for dtype in _dtypes(main)
    }
    return [point for point in main if point.config.tokens == most[point.config.dtype]]


def _key(point: Point) -> tuple[int, int, int, str, int]:
    config = point.config
    return (
        config.hidden, config.neurons, config.experts, config.routing, config.neuron_block
    )  # fmt: skip


def _dtypes(found: Sequence[Point]) -> list[str]:
    return sorted({point.config.dtype for point in found}, reverse=True)


def _shape(found: Sequence[Point]) -> str:
    """H, F and E, without the rest of the label."""
    return ", ".join(found[0].config.shape.split(", ")[1:4])


def _panels(
    found: Sequence[Point],
    draw: Callable[[Axes, list[Point]], None],
    ylabel: str,
    *,
    height: float = 3.9,
    share: bool = True,
    settings: dict[str, Any] = SETTINGS,
) -> Figure | None:
    """A panel for each dtype of the points, drawn from its own, which rise in r; one legend."""
    dtypes = _dtypes(found)
    if not found:
        return None
    with plt.rc_context(settings):
        figure, ((*panels,),) = plt.subplots(
            1, len(dtypes), figsize=(9, height), sharey=share, squeeze=False
        )
        for panel, dtype in zip(panels, dtypes, strict=True):
            mine = [point for point in found if point.config.dtype == dtype]
            draw(panel, sorted(mine, key=lambda point: point.ratio))
        panels[0].set_ylabel(ylabel)
        plots.legend_below(figure, panels[0], share=0.09, most=6)
    return figure


def _cell_of(mine: Sequence[Point], results: RaceResults) -> CellResults:
    return next(cell for cell in results.cells if cell.config == mine[0].config)


def _even(axes: Axes) -> None:
    axes.axhline(1.0, color=ROOF, linewidth=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _share_axis(panel: Axes, mine: Sequence[Point]) -> list[float]:
    """The shares of neurons kept, which the x axis shows."""
    shares = [point.ratio for point in mine]
    panel.set_xscale("log", base=2)
    panel.set_xticks(shares, [fraction(share) for share in shares])
    panel.set_xlabel("r, share of neurons kept")
    panel.set_title(f"{mine[0].config.dtype}, N {mine[0].config.tokens}, {_shape(mine)}")
    return shares
