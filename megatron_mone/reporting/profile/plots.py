"""Plots of a profile's time: phases, passes, ranks, other world sizes. Draws; writes nothing.

Each function takes a profile and returns a figure, or None where the
profile lacks what it would draw.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from megatron_mone.common.phases import COMMUNICATION, PASSES
from megatron_mone.profiling.profile_document import Profile, ProfiledRun
from megatron_mone.reporting.page import plots
from megatron_mone.reporting.profile.view import (
    all_phases,
    large_phases,
    milliseconds,
    name_of,
    rank_ranges,
    tokens_per_second,
)

# Names in a profile are other people's text: a dollar sign must not start a formula.
SETTINGS = {**plots.SETTINGS, "font.size": 10, "text.parse_math": False, "hatch.linewidth": 0.7}
WIDTH = 9.0
"""Inches of every figure; the page shows them all equally wide."""

# Blues: the dense model; yellow to brown: the experts; greens: MoNE's own work; greys: the rest;
# hatched: waiting for other ranks.
PHASE_COLOURS = {
    "data": "#C9C9C9", "embedding": "#B8D8EE", "attention": "#0072B2",
    "mamba": "#3E8FA8", "layer norm": "#56B4E9",
    "dense MLP": "#12456B", "router": "#F0E442", "latent projection": "#A68A64",
    "permute": "#C9B037", "dispatch": "#CC79A7",
    "gate GEMM": "#F2B447", "selection": "#009E73", "up/down GEMM": "#D55E00",
    "balance loss": "#8FD3B6", "combine": "#E3B3CE", "shared experts": "#8C4A1A",
    "loss": "#7B8794", "grad reduce": "#9B5B8F", "clipping": "#8A8A8A", "optimizer": "#4A4A4A",
    "parameter gather": "#B58BB0",
    "pipeline bubble": "#F4E3EE", "exposed communication": "#6B3F6B", "other": "#E4E4E4",
}  # fmt: skip
RUN_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
_HATCH = "//////"
_MOST_COLUMNS = 400


def phase_bars(profile: Profile) -> Figure:
    """One stacked bar a run, phases in their order, with its total and ratio to the baseline."""
    runs = profile.runs
    phases = all_phases(runs)
    longest = max(run.step_ms for run in runs)
    with plt.rc_context({**SETTINGS, "axes.grid": False}):
        legend_rows = math.ceil(len(phases) / 5)
        height = 0.75 + 0.95 * len(runs) + 0.23 * legend_rows
        figure, axes = plt.subplots(figsize=(WIDTH, height))
        axes.set_xlim(0, longest * (1.24 if len(runs) > 1 else 1.1))
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_yticks(range(len(runs)), [name_of(run) for run in runs])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("ms a step, mean over ranks")
        below = (0.23 * legend_rows + 0.05) / height
        figure.tight_layout(rect=(0, below, 1, 1))
        for row, run in enumerate(runs):
            _stack(axes, row, run, phases)
            axes.text(run.step_ms + 0.008 * longest, row, _total(run, runs), va="center",
                      fontsize=9.5, fontweight="bold")  # fmt: skip
        figure.legend(
            [_swatch(phase) for phase in phases], phases, loc="lower center",
            ncols=min(5, len(phases)), frameon=False, fontsize=8.5, handlelength=1.6,
        )  # fmt: skip
    return figure


def passes(profile: Profile) -> Figure:
    """Bars by phase and run, one panel for forward, backward and recompute where they ran."""
    runs = profile.runs
    shown = [
        name for name in PASSES
        if any(split.get(name) for run in runs for split in run.passes.values())
    ] or [PASSES[0]]  # fmt: skip
    phases = large_phases(runs)
    thick = 0.8 / len(runs)
    with plt.rc_context({**SETTINGS, "axes.grid": False, "font.size": 9}):
        height = 0.9 + len(phases) * (0.14 + 0.11 * len(runs))
        figure, panels = plt.subplots(1, len(shown), figsize=(WIDTH, height), sharey=True,
                                      sharex=True, squeeze=False)  # fmt: skip
        for panel, name in zip(panels[0], shown, strict=True):
            for i, (run, colour) in enumerate(zip(runs, _colours(runs), strict=True)):
                values = [run.passes.get(phase, {}).get(name, 0.0) for phase in phases]
                where = [row - 0.4 + (i + 0.5) * thick for row in range(len(phases))]
                bars = panel.barh(where, values, height=0.9 * thick, color=colour)
                labels = [milliseconds(value) if value else "" for value in values]
                panel.bar_label(bars, labels, padding=2, fontsize=7.5)
            panel.set_title(name, fontsize=10)
            panel.set_xlabel("ms a step")
            panel.margins(x=0.16)
            for row in range(1, len(phases), 2):
                panel.axhspan(row - 0.5, row + 0.5, color="#F4F4F4", zorder=0)
        panels[0][0].set_yticks(range(len(phases)), phases)
        panels[0][0].set_ylim(len(phases) - 0.5, -0.5)
        run_legend(figure, runs, 0.3 / height)
    return figure


def rank_heat_map(profile: Profile, run: ProfiledRun) -> Figure | None:
    """Phases by ranks: time over the median of the same phase in the same pipeline stage.

    White is the median, grey a rank without a file or a phase that does not run there. Beyond 400
    ranks a column stands for several and shows the one furthest from the median. None for one
    rank.
    """
    world = profile.ranks.world_size
    phases = large_phases([run])
    if world < 2 or not phases:
        return None
    ratios = _ratios_by_rank(run, phases, world)
    pooled = _pool(ratios)
    with plt.rc_context({**SETTINGS, "axes.grid": False, "font.size": 9}):
        figure, axes = plt.subplots(figsize=(WIDTH, 1.35 + 0.22 * len(phases)))
        limit = float(np.clip(np.nanmax(np.abs(pooled), initial=0.0), np.log2(1.1), 1.0))
        colours = plt.get_cmap("RdBu_r").with_extremes(bad="#B5B5B5")
        image = axes.imshow(
            np.ma.masked_invalid(pooled), aspect="auto", interpolation="nearest", cmap=colours,
            vmin=-limit, vmax=limit, extent=(-0.5, world - 0.5, len(phases) - 0.5, -0.5),
        )  # fmt: skip
        if pooled.size <= 120:
            _write_ratios(axes, pooled, colours, limit)
        axes.set_yticks(range(len(phases)), phases)
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        _rank_axis(axes, profile, run, world)
        bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.03)
        ticks = [-limit, -limit / 2, 0.0, limit / 2, limit]
        bar.set_ticks(ticks, labels=[f"{2**tick:.2f}" for tick in ticks])
        bar.set_label("time / median", fontsize=9)
        figure.tight_layout()
    return figure


def scaling(profile: Profile, others: Sequence[Profile]) -> Figure | None:
    """Tokens a second of a rank, and parallel efficiency, against ranks; None without `others`."""
    points = scaling_points(profile, others)
    if not others:
        return None
    sizes = sorted({size for line in points.values() for size, _ in line})
    names = {run.name: name_of(run) for run in profile.runs}
    with plt.rc_context(SETTINGS):
        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.5))
        for (run, line), colour in zip(points.items(), RUN_COLOURS, strict=False):
            ranks, rates = zip(*line, strict=True)
            style = {"color": colour, "marker": "o", "markersize": 4.5, "linewidth": 2}
            left.plot(ranks, rates, label=names[run], **style)
            right.plot(ranks, [100.0 * rate / rates[0] for rate in rates], **style)
        right.axhline(100.0, color="#444444", linewidth=1, linestyle=":")
        left.set(ylabel="tokens / s of one rank", xlabel="ranks")
        right.set(ylabel="parallel efficiency (%)", xlabel="ranks")
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        for panel in (left, right):
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.minorticks_off()
            panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        run_legend(figure, profile.runs, 0.08)
    return figure


def scaling_points(
    profile: Profile, others: Sequence[Profile]
) -> dict[str, list[tuple[int, float]]]:
    """Run name -> (ranks, tokens a second of one rank) by rising ranks, for `profile`'s runs."""
    points: dict[str, list[tuple[int, float]]] = {run.name: [] for run in profile.runs}
    for one in sorted([profile, *others], key=lambda p: p.ranks.world_size):
        world = one.ranks.world_size
        for run in one.runs:
            if run.name in points:
                points[run.name].append((world, tokens_per_second(one, run) / world))
    return points


def run_legend(figure: Figure, runs: Sequence[ProfiledRun], below: float) -> None:
    """The runs' names under the figure; `below` is the share of its height kept for them."""
    figure.tight_layout(rect=(0, below, 1, 1))
    handles = [Patch(color=colour) for colour in _colours(runs)]
    names = [name_of(run) for run in runs]
    figure.legend(handles, names, loc="lower center", ncols=min(4, len(names)), frameon=False)


def _colours(runs: Sequence[ProfiledRun]) -> list[str]:
    return [RUN_COLOURS[i % len(RUN_COLOURS)] for i in range(len(runs))]


def _swatch(phase: str) -> Patch:
    return Patch(facecolor=PHASE_COLOURS[phase], edgecolor="white", linewidth=0.5,
                 hatch=_HATCH if phase in COMMUNICATION else None)  # fmt: skip


def _total(run: ProfiledRun, runs: Sequence[ProfiledRun]) -> str:
    text = f"{milliseconds(run.step_ms)} ms"
    if len(runs) < 2 or run is runs[1]:
        return text
    return f"{text}\n{run.step_ms / runs[1].step_ms:.2f} of {name_of(runs[1])[:16]}"


def _stack(axes: Axes, row: int, run: ProfiledRun, phases: Sequence[str]) -> None:
    left = 0.0
    for phase in phases:
        ms = run.phases.get(phase, 0.0)
        if not ms:
            continue
        axes.barh(row, ms, left=left, height=0.76, color=PHASE_COLOURS[phase], edgecolor="white",
                  linewidth=0.5, hatch=_HATCH if phase in COMMUNICATION else None)  # fmt: skip
        _label(axes, row, left, ms, phase)
        left += ms


def _label(axes: Axes, row: int, left: float, ms: float, phase: str) -> None:
    """The phase's name inside its segment: upright if that fits, else turned, else not at all."""
    colour = PHASE_COLOURS[phase]
    per_ms = axes.get_window_extent().width / (axes.get_xlim()[1] - axes.get_xlim()[0])
    tall = 0.76 * axes.get_window_extent().height / abs(np.diff(axes.get_ylim())[0])
    narrow = phase.replace(" ", "\n")
    texts = ((f"{phase}\n{milliseconds(ms)}", 0, 8), (f"{narrow}\n{milliseconds(ms)}", 0, 8),
             (phase, 90, 8), (narrow, 90, 7.5))  # fmt: skip
    halo = patheffects.withStroke(linewidth=2.5, foreground=colour)
    write_inside(axes, (left + ms / 2, row), (per_ms * ms, tall), texts, color=ink(colour),
                 path_effects=[halo] if phase in COMMUNICATION else [])  # fmt: skip


def write_inside(
    axes: Axes, centre: tuple[float, float], room: tuple[float, float],
    texts: Sequence[tuple[str, float, float]], **style: Any,
) -> None:  # fmt: skip
    """The first of some texts that fits, or none.

    Args:
        axes: whose limits and size are settled.
        centre: of the text.
        room: its width and height in pixels.
        texts: words, angle and font size of each.
        style: of matplotlib's text.
    """
    for words, angle, size in texts:
        text = axes.text(*centre, words, ha="center", va="center", fontsize=size, rotation=angle,
                         linespacing=1.1, **style)  # fmt: skip
        box = text.get_window_extent()
        if box.width <= 0.94 * room[0] and box.height <= 0.98 * room[1]:
            return
        text.remove()


def ink(colour: str | tuple[float, ...]) -> str:
    """Black or white, whichever reads better on `colour`."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"


def _ratios_by_rank(run: ProfiledRun, phases: Sequence[str], world: int) -> np.ndarray:
    """[phases, world] log2 of time over the stage's median; NaN where there is none."""
    ranks = np.asarray(run.by_rank.rank, dtype=int)
    stages = np.asarray(run.by_rank.stage, dtype=int)
    ratios = np.full((len(phases), world), np.nan)
    for row, phase in enumerate(phases):
        times = np.asarray(run.by_rank.phases.get(phase, np.zeros(len(ranks))), dtype=float)
        for stage in np.unique(stages):
            of_stage = stages == stage
            median = float(np.median(times[of_stage]))
            if median > 0.0:
                least = median / 1024  # a rank that took no time at all is drawn as the fastest
                ratios[row, ranks[of_stage]] = np.log2(np.maximum(times[of_stage], least) / median)
    return ratios


def ranks_in_a_column(world_size: int) -> int:
    """How many ranks one column of the heat map stands for."""
    return math.ceil(world_size / _MOST_COLUMNS)


def _pool(ratios: np.ndarray) -> np.ndarray:
    """At most _MOST_COLUMNS columns, each the value furthest from 0 of its ranks."""
    phases, world = ratios.shape
    width = ranks_in_a_column(world)
    padded = np.full((phases, math.ceil(world / width) * width), np.nan)
    padded[:, :world] = ratios
    groups = padded.reshape(phases, -1, width)
    furthest = np.where(np.isnan(groups), -1.0, np.abs(groups)).argmax(axis=2)
    return np.take_along_axis(groups, furthest[..., None], axis=2)[..., 0]


def _write_ratios(axes: Axes, pooled: np.ndarray, colours: Colormap, limit: float) -> None:
    shade = Normalize(-limit, limit, clip=True)
    for row, column in np.ndindex(*pooled.shape):
        value = pooled[row, column]
        if not np.isnan(value):
            axes.text(column, row, f"{2**value:.2f}", ha="center", va="center", fontsize=7.5,
                      color=ink(colours(shade(value))[:3]))  # fmt: skip


def _rank_axis(axes: Axes, profile: Profile, run: ProfiledRun, world: int) -> None:
    """Ticks for few ranks, lines between nodes, marks over stragglers."""
    axes.set_xlabel("rank")
    if world <= 24:
        axes.set_xticks(range(world))
    host_of = {rank: host for host, ranks in profile.ranks.hosts.items() for rank in ranks}
    ends = [r for r in range(1, world)
            if r in host_of and r - 1 in host_of and host_of[r] != host_of[r - 1]]  # fmt: skip
    # Lines close together would hide the colours.
    top = 1.0 if len(ends) < 33 else -0.025
    axes.vlines([rank - 0.5 for rank in ends], -0.001 if top > 0 else 0.0, top, color="black",
                linewidth=1.2 if len(ends) < 17 else 0.5, clip_on=False,
                transform=axes.get_xaxis_transform())  # fmt: skip
    slow = sorted({entry.rank for entry in run.stragglers})
    if slow:
        axes.plot(slow, [1.03] * len(slow), marker="v", color="#B2182B", linestyle="",
                  markersize=7, clip_on=False, transform=axes.get_xaxis_transform())  # fmt: skip
    absent = profile.ranks.missing
    if absent:
        axes.plot(absent, [1.03] * len(absent), marker="x", color="#666666", linestyle="",
                  markersize=5, clip_on=False, transform=axes.get_xaxis_transform())  # fmt: skip
    words = [f"▼ straggler: rank {rank_ranges(slow, most=5)}"] if slow else ["no stragglers"]
    words += [f"✕ no file: rank {rank_ranges(absent, most=5)}"] if absent else []
    axes.set_title("    ".join([name_of(run), *words]), fontsize=10, loc="left",
                   pad=14 if slow or absent else 6)  # fmt: skip
