"""One predicted step as a picture: a row a pipeline stage, a box a pass. Draws; writes nothing."""

from collections.abc import Sequence
from functools import lru_cache

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_mone.planning.plan_document import PlannedModel
from megatron_mone.reporting.plan.perfetto import (
    BACKWARD,
    FORWARD,
    GATHER,
    OPTIMIZER,
    REDUCE,
    Slice,
    step_slices,
)
from megatron_mone.reporting.plan.plots import WHOLE
from megatron_mone.reporting.profile.plots import PHASE_COLOURS, SETTINGS, WIDTH, ink
from megatron_mone.reporting.profile.view import name_of

COLOURS = {
    GATHER: PHASE_COLOURS["combine"],
    FORWARD: "#56B4E9",
    BACKWARD: "#0072B2",
    REDUCE: PHASE_COLOURS["grad reduce"],
    OPTIMIZER: PHASE_COLOURS["optimizer"],
}
"""Of a stage's first chunk; passes of later chunks are lighter."""
BUBBLE_COLOUR = PHASE_COLOURS["pipeline bubble"]
MANY_PASSES = 72
"""Of one stage; above them, the beginning and the end are drawn in detail, too."""
_HALF_ROW = 0.42


def timeline(model: PlannedModel, longest_ms: float) -> Figure:
    """One step of a model; gaps are waiting for other stages.

    Args:
        model: of a checked plan.
        longest_ms: the longest step of the models compared, for one scale in all pictures.
    """
    rows = step_slices(model.timeline)
    end = max(one.end for row in rows for one in row)
    details = detailed(model)
    tall = min(0.27, 3.6 / len(rows)) * len(rows)
    with plt.rc_context({**SETTINGS, "axes.grid": False, "font.size": 9}):
        height = 1.3 + tall + ((1.1 + tall) if details else 0.0)
        figure = plt.figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.add_gridspec(2 if details else 1, 2)
        whole = figure.add_subplot(grid[0, :])
        ground = model.timeline.shown == "all"  # else what is not shown looks like waiting
        _draw(whole, rows, (0.0, max(end, longest_ms)), ground)
        if details:
            whole.set_rasterized(True)  # thousands of boxes, a pixel wide
        else:
            _number(whole, rows, 0.88 * WIDTH)
        whole.set_title(f"{name_of(model)}: one step", fontsize=10, loc="left")
        if details:
            width = _detail_width(rows, end)
            for column, (name, window) in enumerate(
                (("its beginning", (0.0, width)), ("its end", (end - width, end)))
            ):
                axes = figure.add_subplot(grid[1, column])
                _draw(axes, rows, window, ground)
                _number(axes, rows, 0.41 * WIDTH)
                axes.set_title(name, fontsize=10, loc="left")
        _legend(figure)
    return figure


def detailed(model: PlannedModel) -> bool:
    """Whether the step has so many passes that its ends are drawn in detail as well."""
    return max(len(row) for row in model.timeline.stages) > MANY_PASSES


@lru_cache(maxsize=1024)  # thousands of boxes share a few colours
def _shade(category: str, share: float) -> str:
    return to_hex([c + share * (1.0 - c) for c in to_rgb(COLOURS[category])])


def colour_of(one: Slice, chunks: int) -> str:
    """The category's colour, lighter for later chunks of the stage."""
    return _shade(one.category, 0.55 * (one.chunk or 0) / chunks)


def _detail_width(rows: Sequence[Sequence[Slice]], end: float) -> float:
    """ms that a detail shows: until the first backward has ended, and somewhat more."""
    backwards = [one.end for row in rows for one in row if one.category == BACKWARD]
    return min(1.25 * min(backwards, default=end), 0.5 * end)


def _draw(
    axes: Axes, rows: Sequence[Sequence[Slice]], window: tuple[float, float], ground: bool
) -> None:
    """The rows between two times; `ground`: whether what lies between passes is a bubble."""
    begin, end = window
    axes.set_xlim(begin, end)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    step = 1 if len(rows) <= 16 else 4
    axes.set_yticks(range(0, len(rows), step), [f"stage {i}" for i in range(0, len(rows), step)])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xlabel("ms since the step began")
    axes.xaxis.set_major_formatter(WHOLE)
    axes.spines["left"].set_visible(False)
    chunks = _chunks(rows)
    by_colour: dict[str, list[list[tuple[float, float]]]] = {}
    for number, row in enumerate(rows):
        if ground:
            passes = [one for one in row if one.micro_batch is not None]
            around = Slice(passes[0].start, passes[-1].end, FORWARD)
            by_colour.setdefault(BUBBLE_COLOUR, []).append(_corners(number, around, window))
        for one in row:
            if one.end > begin and one.start < end:
                colour = colour_of(one, chunks)
                by_colour.setdefault(colour, []).append(_corners(number, one, window))
    # boxes of a few pixels would drown in their edges
    thin = sum(map(len, by_colour.values())) > MANY_PASSES * len(rows)
    for colour, boxes in by_colour.items():
        edges = {"linewidth": 0.0} if thin else {"edgecolor": "white", "linewidth": 0.4}
        axes.add_collection(PolyCollection(boxes, facecolor=colour, **edges))


def _corners(row: int, one: Slice, window: tuple[float, float]) -> list[tuple[float, float]]:
    """A box, cut at the window, so that the picture's file holds only what is seen."""
    left, right = max(one.start, window[0]), min(one.end, window[1])
    low, high = row - _HALF_ROW, row + _HALF_ROW
    return [(left, low), (right, low), (right, high), (left, high)]


def _number(axes: Axes, rows: Sequence[Sequence[Slice]], inches: float) -> None:
    """Micro-batches' numbers in the boxes that are wide enough; `inches`: of the axes."""
    begin, end = axes.get_xlim()
    points_per_ms = 72 * inches / (end - begin)
    chunks = _chunks(rows)
    for number, row in enumerate(rows):
        for one in row:
            text = "" if one.micro_batch is None else str(one.micro_batch)
            seen = begin <= one.start and one.end <= end
            if text and seen and 4.2 * len(text) + 1 < points_per_ms * (one.end - one.start):
                axes.text((one.start + one.end) / 2, number, text, ha="center", va="center",
                          fontsize=6.5, color=ink(colour_of(one, chunks)))  # fmt: skip


def _chunks(rows: Sequence[Sequence[Slice]]) -> int:
    return 1 + max(one.chunk or 0 for row in rows for one in row)


def _legend(figure: Figure) -> None:
    swatches = [Patch(color=colour) for colour in (*COLOURS.values(), BUBBLE_COLOUR)]
    figure.legend(swatches, [*COLOURS, "bubble"], loc="outside lower center", ncols=6,
                  frameon=False, fontsize=8.5, handlelength=1.4)  # fmt: skip
