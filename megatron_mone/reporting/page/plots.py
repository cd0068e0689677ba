"""The report's plots, each as PNG and SVG. Colours mean the same run everywhere."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_mone.reporting.page.results import (
    LayerLoad,
    RunResult,
    median_after_first,
    write_atomically,
)

# Okabe and Ito's colours, told apart with every common colour blindness.
COLOURS = {
    "mone": "#D55E00",
    "moe_total": "#0072B2",
    "moe_active": "#009E73",
    "mone_without_ng": "#999999",
}
NAMES = {
    "mone": "MoNE, r = 1/4",
    "moe_total": "MoE, same total",
    "moe_active": "MoE, same active",
    "mone_without_ng": "MoNE, no NG-LBL",
}
STYLES = {"mone": "-", "moe_total": "--", "moe_active": "-."}
LOAD_TICKS = ([1 / 32, 1 / 8, 1 / 2, 1, 2, 4], ["1/32", "1/8", "1/2", "1", "2", "4"])
DPI = 150
SETTINGS = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}


def save(figure: Figure, stem: Path) -> bytes:
    """Write STEM.png and STEM.svg, close the figure, and return the PNG."""
    buffers = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        # matplotlib would put a date and its own address into the file.
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        with plt.rc_context({"svg.hashsalt": "megatron-mone"}):  # the same ids each time
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        write_atomically(stem.with_suffix(f".{kind}"), buffer.getvalue())
        buffers[kind] = buffer.getvalue()
    plt.close(figure)
    return buffers["png"]


def validation_loss(runs: Sequence[RunResult], unigram_loss: float) -> Figure:
    """Validation loss (nats per token) against tokens, left, and active FLOPs, right."""
    with plt.rc_context(SETTINGS):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True)
        for run in runs:
            steps, losses = zip(*run.validation_loss, strict=True)
            tokens = [step * run.tokens_per_step / 1e3 for step in steps]
            flops = [step * run.active_flops_per_step / 1e12 for step in steps]
            _line(left, run, tokens, list(losses), marker="o")
            _line(right, run, flops, list(losses), marker="o")
        for axes in (left, right):
            axes.axhline(unigram_loss, color="#444444", linewidth=1, linestyle=":")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6))
        left.text(
            0.99, unigram_loss, "unigram", ha="right", va="bottom", fontsize=10, color="#444444",
            transform=left.get_yaxis_transform(),
        )  # fmt: skip
        left.set(xlabel="tokens (thousands)", ylabel="validation loss (nats / token)")
        right.set_xlabel("active FLOPs, all ranks ($10^{12}$)")
        legend_below(figure, left)
    return figure


def training_loss(runs: Sequence[RunResult], unigram_loss: float) -> Figure:
    """Training loss of every step (nats per token), faint, and its running mean."""
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(9, 3.9))
        for run in runs:
            steps, losses = zip(*run.training_loss, strict=True)
            axes.plot(steps, losses, color=COLOURS.get(run.name), alpha=0.2, linewidth=0.8)
            _line(axes, run, list(steps), _running_mean(losses), marker=None)
        axes.axhline(unigram_loss, color="#444444", linewidth=1, linestyle=":")
        axes.set(xlabel="step", ylabel="training loss (nats / token)")
        axes.set_xlim(left=0)
        legend_below(figure, axes)
    return figure


def step_time(runs: Sequence[RunResult]) -> Figure:
    """Milliseconds of a step over training, one point a logging window."""
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(9, 3.4))
        for run in runs:
            steps, seconds = zip(*run.step_seconds, strict=True)
            _line(axes, run, list(steps), [1e3 * value for value in seconds], marker=".")
        axes.set(xlabel="step", ylabel="ms / step")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        legend_below(figure, axes)
    return figure


def cost(runs: Sequence[RunResult]) -> Figure:
    """Bars: step time (ms), peak memory (MiB), executed and active GFLOP/s a rank."""
    panels = {
        "median ms / step": [run.step_ms for run in runs],
        "peak memory of rank 0 (MiB)": [run.peak_bytes / 2**20 for run in runs],
        "executed GFLOP/s per rank": [1e3 * median_after_first(r.executed_tflops) for r in runs],
        "active GFLOP/s per rank": [1e3 * median_after_first(r.active_tflops) for r in runs],
    }
    with plt.rc_context({**SETTINGS, "axes.grid": False, "font.size": 10}):
        figure, axes = plt.subplots(2, 2, figsize=(9, 3.6))
        labels = [NAMES.get(run.name, run.name) for run in runs]
        colours = [COLOURS.get(run.name, "#666666") for run in runs]
        for panel, (title, values) in zip(axes.flat, panels.items(), strict=True):
            bars = panel.barh(labels, values, color=colours)
            panel.bar_label(bars, fmt="%.3g" if max(values) < 100 else "%.0f", padding=3)
            panel.set_title(title, fontsize=10)
            panel.set_xlim(right=1.18 * max(values))
            panel.invert_yaxis()
        # The two rates share a scale: their difference is the point.
        right = 1.18 * max(panels["executed GFLOP/s per rank"])
        for panel in axes[1]:
            panel.set_xlim(right=right)
        figure.tight_layout()
    return figure


def neuron_load(
    step: int, with_ng: dict[str, LayerLoad], without_ng: dict[str, LayerLoad]
) -> Figure:
    """Share of neurons by load, one panel a layer, with and without the balance loss.

    Args:
        step: where both windows end.
        with_ng: layer -> load of the run with NG-LBL.
        without_ng: the same layers without it.
    """
    layers = sorted(with_ng, key=int)
    with plt.rc_context(SETTINGS):
        figure, panels = plt.subplots(1, len(layers), figsize=(9, 3.6), sharey=True, squeeze=False)
        for panel, layer in zip(panels[0], layers, strict=True):
            _load_curve(panel, without_ng[layer], "mone_without_ng", filled=True)
            _load_curve(panel, with_ng[layer], "mone", filled=False)
            panel.axvline(1.0, color="#444444", linewidth=1, linestyle=":")
            panel.set(title=f"layer {layer}, step {step}", xlabel="load / balanced load")
            panel.set_xscale("log", base=2)
            panel.set_xticks(*LOAD_TICKS)
        panels[0][0].set_ylabel("share of neurons (%)")
        legend_below(figure, panels[0][0])
    return figure


def _load_curve(axes: Axes, load: LayerLoad, name: str, *, filled: bool) -> None:
    limits, counts = load.histogram.limits, load.histogram.counts
    total = sum(counts) or 1.0
    shares = [100.0 * count / total for count in counts]
    # The first bucket reaches down to 0, which a logarithmic axis cannot show: drawn as wide as
    # the second.
    edges = [limits[0] ** 2 / limits[1], *limits]
    label = {"mone": "with NG-LBL", "mone_without_ng": "without NG-LBL"}[name]
    axes.stairs(shares, edges, color=COLOURS[name], fill=filled, label=label,
                linewidth=1.8, alpha=0.6 if filled else 1.0)  # fmt: skip
    axes.set_xlim(edges[0] / 1.2, max(4.0, load_end(load)) * 1.2)


def load_end(load: LayerLoad) -> float:
    """Upper limit of the last bucket that holds a neuron."""
    pairs = zip(load.histogram.limits, load.histogram.counts, strict=True)
    return max((limit for limit, count in pairs if count), default=1.0)


def _line(axes: Axes, run: RunResult, x: list, y: list, marker: str | None) -> None:
    axes.plot(x, y, color=COLOURS.get(run.name), label=NAMES.get(run.name, run.name),
              linestyle=STYLES.get(run.name, "-"), marker=marker, markersize=4.5,
              linewidth=2)  # fmt: skip


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the values before each, up to a fiftieth of all."""
    window = max(1, len(values) // 50)
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))
    ]


def legend_below(figure: Figure, axes: Axes, *, share: float = 0.1, most: int = 99) -> None:
    """The legend of `axes` under the figure, in `share` of its height, `most` names a row."""
    handles, labels = axes.get_legend_handles_labels()
    figure.tight_layout(rect=(0, share, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=min(most, len(labels)), frameon=False)
