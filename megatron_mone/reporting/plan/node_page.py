"""What `megatron-mone calibrate` timed, for people: lines, a page and its plots.

May touch: the page's folder.
"""

from collections.abc import Iterator
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from megatron_mone.planning.fitting.node_fit import NodeFit, of_kind
from megatron_mone.planning.fitting.node_times import LinkTime, OperatorTime
from megatron_mone.reporting.page.plots import COLOURS, SETTINGS
from megatron_mone.reporting.plan.page import PAGE, PlanPage

_SHOWN = 40


def lines(found: NodeFit) -> str:
    """The most expensive operators, the collectives, and what was left out."""
    return "\n".join(_lines(found))


def _lines(found: NodeFit) -> Iterator[str]:
    yield f"{'operator':28}{'shapes':44}{'us':>10}{'by its curve':>14}  what ran"
    for one, curved in _dearest(found)[:15]:
        yield (
            f"{one.operator.name:28.28}{_shapes(one):44.44}{1e6 * one.seconds:10,.1f}"
            f"{1e6 * curved:14,.1f}  {one.by}"
        )
    yield ""
    yield f"{'collective':28}{'ranks, stride':>16}{'bytes':>14}{'us':>12}"
    for link in found.times.links:
        yield _link_line(link)
    yield ""
    yield from _said(found)


def _said(found: NodeFit) -> Iterator[str]:
    times = found.times
    for kind, (timed, of) in found.kinds.items():
        yield f"{kind}: {timed} of {of} operators timed"
    if found.small is not None and times.small_job is not None:
        scales = ", ".join(f"{name} x {by:.2f}" for name, by in found.small.phases.items())
        waits = sum(one.ms for one in times.small_job.collectives)
        yield (
            f"small job: a step takes {times.small_job.step_ms:.1f} ms, {waits:.1f} of them "
            f"collectives; its operators take {1e3 * found.small.seconds:.1f}, by themselves "
            f"{1e3 * found.small.operators:.1f}: {scales}"
        )
    launch = found.launch
    if launch is not None:
        yield (
            f"launch: one layer on one rank takes {1e3 * launch.seconds:.1f} ms, its operators by "
            f"themselves {1e3 * launch.operators:.1f} ({launch.launches} launches in its passes): "
            f"{1e6 * found.efficiency.kernel_seconds:.1f} us of the host a launch"
        )
    yield from (f"left out: {words}" for words in times.notes)
    yield found.efficiency.source


def _dearest(found: NodeFit) -> list[tuple[OperatorTime, float]]:
    both = list(zip(found.times.operators, found.curved, strict=True))
    return sorted(both, key=lambda pair: -pair[0].share)


def _shapes(one: OperatorTime) -> str:
    return " ".join("x".join(map(str, shape)) or "1" for shape in one.operator.inputs)


def _link_line(one: LinkTime) -> str:
    link = one.link
    return (
        f"{link.kind + ' ' + link.group:28.28}{f'{link.ranks}, {link.stride}':>16}"
        f"{link.bytes:14,}{1e6 * one.seconds:12,.1f}"
    )


def write_page(found: NodeFit, folder: Path) -> Path:
    """Write report.html and its plots; returns the page's path."""
    times = found.times
    page = PlanPage(f"Calibration of {times.device} for {times.job.model}", folder)
    page.paragraph(found.efficiency.source)
    if not times.on_cpu:
        page.warning("Calibration on GPUs was written without one: read these times with care.")
    for words in times.notes:
        page.warning(words)
    page.bullets(list(_said(found))[:-1])
    page.heading("Operators")
    page.plot(
        "operators", _operators(found),
        "Each timed operator against what the fitted curve of its kind says of it. Those that are "
        "timed are priced by their time, curves price the others.",
    )  # fmt: skip
    rows = [
        (one.operator.name, _shapes(one), one.operator.dtype, f"{1e6 * one.seconds:,.1f}",
         f"{1e6 * curved:,.1f}", f"{one.share:.1%}", one.by)
        for one, curved in _dearest(found)[:_SHOWN]
    ]  # fmt: skip
    header = ("operator", "shapes", "type", "us", "by its curve", "of the price", "what ran")
    page.table(header, rows)
    left = len(times.operators) - len(rows)
    if left > 0:
        page.paragraph(f"{left:,} more, of less of the price, stand in times.json.")
    if times.links:
        page.heading("Collectives")
        page.plot(
            "collectives", _collectives(found),
            "Of one call by the bytes that a rank puts in; all groups of its kind at once.",
        )  # fmt: skip
        page.table(
            ("collective", "ranks", "stride", "bytes", "us", "of the price"),
            [(f"{one.link.kind} {one.link.group}", f"{one.link.ranks}", f"{one.link.stride}",
              f"{one.link.bytes:,}", f"{1e6 * one.seconds:,.1f}", f"{one.share:.1%}")
             for one in times.links],
        )  # fmt: skip
    if times.small_job is not None and times.small_job.collectives:
        page.heading("Collectives in a step")
        page.table(
            ("collective", "bytes", "calls", "us of one, waiting included"),
            [(f"{one.kind} {one.group}", f"{one.bytes:,}", f"{one.calls:,.1f}",
              f"{1e3 * one.ms / one.calls:,.1f}")
             for one in times.small_job.collectives],
        )  # fmt: skip
    page.heading("Machine")
    page.bullets([f"{times.ranks} ranks, {times.processor}", f"Load as it began: {times.load:.1f}"])
    return page.write(folder / PAGE)


def _operators(found: NodeFit) -> Figure:
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(6.4, 5.2))
        colours = list(COLOURS.values())
        for place, kind in enumerate(found.kinds):
            points = [pair for pair in _dearest(found) if of_kind(pair[0]) == kind]
            axes.plot(
                [1e6 * one.seconds for one, _ in points], [1e6 * curved for _, curved in points],
                "o", markersize=4, color=colours[place % len(colours)], label=kind,
            )  # fmt: skip
        every = [1e6 * value for pair in _dearest(found) for value in (pair[0].seconds, pair[1])]
        ends = [min(every) / 1.5, 1.5 * max(every)]
        axes.plot(ends, ends, color="#444444", linewidth=1, zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="timed (us)", ylabel="by its curve (us)")
        axes.legend(fontsize=9, frameon=False)
        figure.tight_layout()
    return figure


def _collectives(found: NodeFit) -> Figure:
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(6.4, 4.4))
        colours = list(COLOURS.values())
        for place, ((kind, ranks, stride), points) in enumerate(
            found.efficiency.measured.links.items()
        ):
            axes.plot(
                [size for size, _ in points], [1e6 * seconds for _, seconds in points], "o-",
                color=colours[place % len(colours)], label=f"{kind}, {ranks} ranks by {stride}",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="bytes of a rank", ylabel="us")
        axes.legend(fontsize=8, frameon=False)
        figure.tight_layout()
    return figure
