"""Plots of a profile's memory, arithmetic and skew. Draws; writes nothing.

Each function takes a profile and returns a figure, or None where the
profile lacks what it would draw.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.common.phases import PHASES
from megatron_mone.profiling.profile_document import NeuronLoad, Profile, ProfiledRun, RunMemory
from megatron_mone.reporting.profile.plots import RUN_COLOURS, SETTINGS, WIDTH, ink, run_legend
from megatron_mone.reporting.profile.view import engineering, mebibytes, name_of

KIND_COLOURS = {
    "weights": "#0072B2", "gradients": "#56B4E9", "optimizer": "#7B8794",
    "activations": "#D55E00", "temporaries": "#F2B447", "communication": "#CC79A7",
}  # fmt: skip
_UNKNOWN_KIND = "#D9D9D9"
_MARKERS = "osD^vP"


def memory_timeline(profile: Profile) -> Figure | None:
    """Bytes by kind over one step of the rank with the highest peak; a panel a run, one scale."""
    runs = _with_memory(profile)
    if not runs:
        return None
    kinds = _kinds(runs)
    with plt.rc_context(SETTINGS):
        height = 0.75 + 1.75 * len(runs)
        figure, panels = plt.subplots(len(runs), 1, figsize=(WIDTH, height), sharex=True,
                                      sharey=True, squeeze=False)  # fmt: skip
        for panel, (run, memory) in zip(panels[:, 0], runs, strict=True):
            _timeline(panel, name_of(run), memory, kinds)
        highest = max(memory.peak_bytes for _, memory in runs) / 2**20
        panels[0, 0].set_ylim(0, 1.3 * highest)
        panels[-1, 0].set_xlabel("ms since the step began (pass with the ledger, not timed)")
        _kind_legend(figure, kinds, 0.36 / height)
    return figure


def memory_at_peak(profile: Profile) -> Figure | None:
    """A stacked bar a run: which kinds the peak is made of."""
    runs = _with_memory(profile)
    if not runs:
        return None
    kinds = _kinds(runs)
    longest = max(memory.peak_bytes for _, memory in runs) / 2**20
    with plt.rc_context({**SETTINGS, "axes.grid": False}):
        height = 1.0 + 0.55 * len(runs)
        figure, axes = plt.subplots(figsize=(WIDTH, height))
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_yticks(range(len(runs)), [name_of(run) for run, _ in runs])
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, 1.22 * longest), xlabel="MiB at the peak")
        for row, (_, memory) in enumerate(runs):
            left = 0.0
            for kind in kinds:
                size = memory.by_kind.get(kind, 0) / 2**20
                colour = KIND_COLOURS.get(kind, _UNKNOWN_KIND)
                axes.barh(row, size, left=left, height=0.7, color=colour, edgecolor="white",
                          linewidth=0.5)  # fmt: skip
                if size > 0.05 * longest:
                    axes.text(left + size / 2, row, mebibytes(size * 2**20).split()[0],
                              ha="center", va="center", fontsize=8.5,
                              color=ink(colour))  # fmt: skip
                left += size
            axes.text(left + 0.01 * longest, row, mebibytes(memory.peak_bytes),
                      va="center", fontweight="bold")  # fmt: skip
        _kind_legend(figure, kinds, 0.34 / height)
    return figure


def roofline(profile: Profile) -> Figure | None:
    """Achieved FLOP/s of the expert GEMMs against operations per byte, under the ranks' roof."""
    points = roofline_points(profile)
    if not points:
        return None
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(WIDTH, 4.4))
        axes.set(xscale="log", yscale="log", xlabel="operations per byte (executed / least bytes)",
                 ylabel="FLOP/s of all ranks, executed")  # fmt: skip
        phases = [phase for phase in PHASES if any(point[1] == phase for point in points)]
        for run, phase, intensity, rate in points:
            colour = RUN_COLOURS[run % len(RUN_COLOURS)]
            axes.plot(intensity, rate, marker=_MARKERS[phases.index(phase) % len(_MARKERS)],
                      color=colour, markersize=9, linestyle="")  # fmt: skip
        peak, bandwidth = roof(profile)
        _set_limits(axes, points, peak, bandwidth)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: _round(value)))
            axis.set_minor_formatter(NullFormatter())
        figure.tight_layout()
        taken = [] if peak is None else [_draw_roof(axes, peak, bandwidth)]
        _name_points(axes, profile, points, taken)
    return figure


def roofline_points(profile: Profile) -> list[tuple[int, str, float, float]]:
    """(index of the run, phase, operations per byte, operations a second over all ranks).

    Operations and bytes are sums over ranks; the time is the phase's mean over ranks.
    """
    points = []
    for i, run in enumerate(profile.runs):
        for phase, size in run.flops.bytes.items():
            counted = run.flops.modules.get(phase)
            done = counted.executed if counted else 0.0
            ms = run.phases.get(phase, 0.0)
            if done and size and ms:
                points.append((i, phase, done / size, 1e3 * done / ms))
    return points


def roof(profile: Profile) -> tuple[float | None, float | None]:
    """(operations a second, bytes a second) that all ranks could do at most; None if unknown.

    Where the profile gives only a utilisation, the peak that it was taken against.
    """
    for run in profile.runs:
        flops = run.flops
        peak = flops.peak_flops
        used = flops.utilisation_executed
        if not peak and used:
            peak = flops.executed_per_s / used
        if peak:
            return peak, flops.peak_bytes_per_s or None
    return None, None


def skew(profile: Profile) -> Figure | None:
    """Rows by expert in each run's most uneven layer, unevenness by layer, load of neurons."""
    routed = [run for run in profile.runs if run.routing.layers]
    if not routed:
        return None
    mone = next(((run, run.neurons) for run in profile.runs if run.neurons is not None), None)
    with plt.rc_context({**SETTINGS, "font.size": 9}):
        count = 2 if mone is None else 3
        figure, panels = plt.subplots(1, count, figsize=(WIDTH, 3.5), squeeze=False)
        by_expert, by_layer = panels[0][:2]
        for i, run in enumerate(profile.runs):
            if run.routing.layers:
                _rows_of(by_expert, by_layer, run, RUN_COLOURS[i % len(RUN_COLOURS)])
        for panel in (by_expert, by_layer):
            panel.axhline(1.0, color="#444444", linewidth=1, linestyle=":")
        by_expert.set(title="most uneven layer", xlabel="experts, busiest first",
                      ylabel="rows / mean")  # fmt: skip
        by_expert.set_ylim(bottom=0)
        by_layer.set(title="busiest expert", xlabel="layer", ylabel="rows / mean")
        by_layer.xaxis.get_major_locator().set_params(integer=True)
        if mone is not None:
            _neuron_panel(panels[0][2], name_of(mone[0]), mone[1])
        run_legend(figure, profile.runs, 0.09)
    return figure


def _neuron_panel(axes: Axes, name: str, neurons: NeuronLoad) -> None:
    """Share of neurons by load, and the loads that 1, 50 and 99% of them lie below."""
    histogram = np.sum([layer.histogram for layer in neurons.layers], axis=0, dtype=float)
    # The first bin reaches down to 0, which a logarithmic axis cannot show.
    edges = [LOAD_EDGES[0] / 2, *LOAD_EDGES, LOAD_EDGES[-1] * 2]
    shares = 100 * histogram / max(histogram.sum(), 1.0)
    axes.stairs(shares, edges, fill=True, color="#009E73", alpha=0.6)
    axes.set(title=f"neuron load, {name}", xlabel="load / balanced load",
             ylabel="share of neurons (%)")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.45 * max(shares.max(), 1e-9))
    loads = (neurons.load_p1, neurons.load_p50, neurons.load_p99)
    values = [max(load, edges[0]) for load in loads]
    held = np.flatnonzero(histogram)
    left, right = (edges[held[0]], edges[held[-1] + 1]) if len(held) else (0.5, 2.0)
    left, right = min(left, values[0] / 2), max(right, values[2] * 2)
    for value, name in zip(values, ("1%", "50%", "99%"), strict=True):
        axes.axvline(value, color="#333333", linewidth=1, ymax=0.82)
        axes.text(value, 0.83, f"{name}\n{value:.2f}", fontsize=8, ha="center", va="bottom",
                  transform=axes.get_xaxis_transform(), linespacing=1.0)  # fmt: skip
    ticks = [tick for tick in (1 / 32, 1 / 8, 1 / 2, 1, 2, 4, 16, 64) if left <= tick <= right]
    axes.set_xticks(ticks, [f"1/{round(1 / t)}" if t < 1 else f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(left, right)


def _rows_of(by_expert: Axes, by_layer: Axes, run: ProfiledRun, colour: str) -> None:
    layers = run.routing.layers
    uneven = max(layers, key=lambda layer: layer.max_over_mean)
    # None: an expert whose ranks are all missing.
    rows = [row for row in uneven.rows if row is not None] or [0]
    mean = sum(rows) / len(rows) if sum(rows) else 1.0
    few = len(rows) <= 64
    by_expert.plot(range(1, len(rows) + 1), sorted((row / mean for row in rows), reverse=True),
                   color=colour, drawstyle="steps-mid", linewidth=1.8,
                   marker="." if few else None)  # fmt: skip
    by_layer.plot([layer.layer for layer in layers],
                  [layer.max_over_mean for layer in layers], color=colour, linewidth=1.8,
                  marker="o" if len(layers) <= 64 else None, markersize=4)  # fmt: skip


def _with_memory(profile: Profile) -> list[tuple[ProfiledRun, RunMemory]]:
    """The runs that had a memory pass."""
    return [(run, run.memory) for run in profile.runs if run.memory is not None]


def _kinds(runs: Sequence[tuple[ProfiledRun, RunMemory]]) -> list[str]:
    """Kinds that hold bytes in any run, in the order they are stacked."""
    used = [kind for _, memory in runs for kind, size in memory.by_kind.items() if size]
    for _, memory in runs:
        used += [kind for kind, sizes in memory.timeline.kinds.items() if any(sizes)]
    return [k for k in KIND_COLOURS if k in used] + sorted({*used} - {*KIND_COLOURS})


def _timeline(axes: Axes, name: str, memory: RunMemory, kinds: Sequence[str]) -> None:
    line = memory.timeline
    none = [0] * len(line.ms)
    sizes = [np.asarray(line.kinds.get(kind, none), dtype=float) / 2**20 for kind in kinds]
    axes.stackplot(line.ms, *sizes, step="post", linewidth=0,
                   colors=[KIND_COLOURS.get(kind, _UNKNOWN_KIND) for kind in kinds])  # fmt: skip
    peak, when = memory.peak_bytes / 2**20, memory.peak_ms
    axes.plot([when], [peak], marker="v", color="black", markersize=6)
    right = when > 0.5 * max(line.ms, default=0.0)
    axes.annotate(
        f"peak {mebibytes(memory.peak_bytes)} in {memory.peak_phase}, {memory.peak_pass}",
        (when, peak), xytext=(-8 if right else 8, 5), textcoords="offset points",
        ha="right" if right else "left", fontsize=9,
    )  # fmt: skip
    axes.set_ylabel("MiB")
    axes.set_title(f"{name}, rank {memory.peak_rank}", fontsize=10, loc="left")
    axes.margins(x=0)


def _kind_legend(figure: Figure, kinds: Sequence[str], below: float) -> None:
    figure.tight_layout(rect=(0, below, 1, 1))
    handles = [Patch(color=KIND_COLOURS.get(kind, _UNKNOWN_KIND)) for kind in kinds]
    figure.legend(handles, list(kinds), loc="lower center", ncols=min(6, len(kinds)),
                  frameon=False, fontsize=9, handlelength=1.4)  # fmt: skip


def _set_limits(
    axes: Axes, points: Sequence[tuple[int, str, float, float]], peak: float | None,
    bandwidth: float | None,
) -> None:  # fmt: skip
    """Whole decades around the points, the roof and its knee."""
    across = [point[2] for point in points]
    up = [point[3] for point in points]
    if peak is not None:
        up.append(peak)
        if bandwidth is not None:
            across.append(peak / bandwidth)
    axes.set_xlim(min(across) / 4, max(across) * 6)
    axes.set_ylim(min(up) / 3, max(up) * 3)


def _draw_roof(axes: Axes, peak: float, bandwidth: float | None) -> Bbox:
    """Draws the roof and says where its label lies."""
    left, right = axes.get_xlim()
    knee = left if bandwidth is None else peak / bandwidth
    axes.plot([max(left, knee), right], [peak, peak], color="#444444", linewidth=1.5)
    if bandwidth is not None and knee > left:
        axes.plot([left, knee], [left * bandwidth, peak], color="#444444", linewidth=1.5)
    label = f"peak of all ranks {engineering(peak, 'FLOP/s')}"
    if bandwidth is not None:
        label += f", {engineering(bandwidth, 'B/s')}"
    text = axes.annotate(label, (right, peak), xytext=(-4, 4), textcoords="offset points",
                         ha="right", fontsize=9, color="#444444")  # fmt: skip
    return text.get_window_extent()


def _name_points(
    axes: Axes, profile: Profile, points: Sequence[tuple[int, str, float, float]],
    taken: list[Bbox],
) -> None:  # fmt: skip
    """A label beside each point, on the side and at the height where it covers nothing."""
    inside, reach = axes.get_window_extent(), 9
    for _, _, intensity, rate in points:
        x, y = axes.transData.transform((intensity, rate))
        taken.append(Bbox.from_extents(x - reach, y - reach, x + reach, y + reach))
    for run, phase, intensity, rate in sorted(points, key=lambda point: -point[3]):
        text = f"{name_of(profile.runs[run])}: {phase}, {engineering(rate, 'FLOP/s')}"
        for drop, side in product(range(0, 150, 7), (1, -1)):
            label = axes.annotate(text, (intensity, rate), xytext=(11 * side, -3 - drop),
                                  textcoords="offset points", fontsize=9,
                                  ha="left" if side > 0 else "right",
                                  color=RUN_COLOURS[run % len(RUN_COLOURS)])  # fmt: skip
            box = label.get_window_extent()
            fits = box.x0 >= inside.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0
            if fits and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _round(value: float) -> str:
    """A tick's value in as few characters as it needs."""
    if value < 1:
        return f"{value:g}"
    return engineering(value).replace(".00", "").replace(".0", "")
