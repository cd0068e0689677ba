"""The report of a grid: report.md, plots, and one page that holds everything."""

from pathlib import Path

from megatron_mone.benchmarking import plots
from megatron_mone.benchmarking.checking import SAMPLED_EXPERTS, SAMPLED_ROWS
from megatron_mone.benchmarking.goal_table import GOALS, above_ceiling, goal_lines, goal_rows
from megatron_mone.benchmarking.goals import Phase
from megatron_mone.benchmarking.race import IN_SIGHT
from megatron_mone.benchmarking.summary import (
    AUTO,
    Point,
    fraction,
    only_slow_bf16,
    points,
    where_mone_wins,
)
from megatron_mone.kernels.race_results import RaceResults, Row
from megatron_mone.reporting.page.html import Page
from megatron_mone.reporting.page.plots import save
from megatron_mone.reporting.page.results import write_atomically

TITLE = "What choosing neurons costs next to dense MoE experts"
_GIVEN = (
    "Everybody gets the same weights, rows, probabilities and incoming gradient; layouts are "
    "arranged before the clock starts. Repeats are interleaved "
)
_GRADIENTS = (
    "forward runs without a graph; forward + backward asks everybody for the gradients of the "
    "rows, the probabilities and all weights."
)
_CHECKED = (
    "Before it is timed every dense peer is compared with the reference that keeps all neurons, "
    "and every MoNE backend with the reference on the neurons it chose (outputs, gradients of rows "
    "and probabilities"
)
_KEPT = (
    "kept is what autograd holds for the backward beside inputs and weights; peak what torch's "
    "allocator handed out at most, gradients included, without the work space that BLAS and oneDNN "
    "take themselves."
)
_ROOFLINE = (
    "The roofline is the larger of operations over the measured peak and bytes over the measured "
    "copy bandwidth, for the algorithm (MoNE's entries: for choosing before computing)."
)
METHODS = {
    "median": (
        f"{_GIVEN}in rotating order after one warm-up; times are medians in ms with the 10th and "
        "90th percentile.",
        _GRADIENTS,
        f"{_CHECKED}). One that disagrees is not the best dense peer.",
        f"ratio is the median over the fastest dense peer's in the same run. {_KEPT}",
        _ROOFLINE,
    ),
    "p10": (
        f"{_GIVEN}in an order drawn for each round, after the two passes that meter memory and "
        "check results; times are medians in ms with the 10th and 90th percentile.",
        "ratio is of the 10th percentiles, which other work on the machine hardly lengthens, to "
        "the fastest dense peer's in the same run.",
        "Memory that is freed stays with the process: who gets new pages, which take longer than a "
        "small cell, would depend on who ran before.",
        f"After the least repeats those go on who are within {IN_SIGHT:g} of the fastest of their "
        "kind (column n). Who fell behind in the same cell with fewer rows is not timed again; the "
        "cell says by how much.",
        _GRADIENTS,
        f"{_CHECKED}, of up to {SAMPLED_ROWS} rows of up to {SAMPLED_EXPERTS} experts). One that "
        "disagrees is not the best dense peer.",
        _KEPT,
        _ROOFLINE,
    ),
}
"""How it was measured, by `Settings.compared`: earlier races had the first way."""
TABLE = ("implementation", "r", "forward", "p10 .. p90", "ratio", "forward + backward",
         "p10 .. p90", "ratio", "roofline", "kept MB", "peak MB", "error", "n")  # fmt: skip
WINS = ("cell", "r", "backend", "fastest dense", "forward", "goal", "forward + backward", "goal",
        "by roofline", "kept")  # fmt: skip


def write_report(out: Path, results: RaceResults) -> Path:
    """Write report.md, report.html and the plots beside results.json; returns report.html."""
    found = points(results)
    figures = []
    for name, draw, caption in plots.PLOTS:
        figure = draw(results, found)
        if figure is not None:
            figures.append((name, caption, save(figure, out / name)))
    write_atomically(out / "report.md", markdown(results, [f[:2] for f in figures]).encode())
    page = Page(TITLE)
    fill_page(page, results, figures)
    write_atomically(out / "report.html", page.render().encode())
    return out / "report.html"


def markdown(results: RaceResults, figures: list[tuple[str, str]]) -> str:
    """The text of report.md."""
    found = points(results)
    lines = [f"# {TITLE}", "", "Made by this command:", "", f"    {results.command}", ""]
    lines += [f"- {name}: {value}" for name, value in _machine(results)]
    lines += ["", "## Where MoNE wins", ""]
    lines += [f"- {text}" for text in where_mone_wins(found)]
    lines += [f"- {text}" for text in _doubts(results)]
    lines += ["", "## Goals", "", *goal_lines(results, found)]
    lines += ["", "## Every figure", ""]
    lines += ["MoNE over the best dense peer; below 1 MoNE is better.", ""]
    lines += _table(WINS, [_win(point) for point in found], text_columns=4)
    for name, caption in figures:
        lines += ["", f"![{caption}]({name}.png)", "", caption]
    lines += ["", "## How it was measured", ""]
    lines += [f"- {text}" for text in METHODS[results.settings.compared]]
    lines += ["", "## Every cell", ""]
    everywhere = _common_remarks(results)
    lines += [*everywhere, ""]
    for cell in results.cells:
        remarks = [line for line in _remarks(cell.results) if line not in everywhere]
        if only_slow_bf16(cell, results):
            remarks.append("- ratio: to peers in bf16 alone, which float32 outruns here")
        lines += [f"### {cell.config.label}", "", *_rows(cell.results), ""]
        lines += [*remarks, ""] if remarks else []
    if results.skipped:
        lines += ["## Left out", ""]
        lines += [f"- {c.config.label}: {c.reason}" for c in results.skipped]
    return "\n".join(lines).rstrip() + "\n"


def fill_page(page: Page, results: RaceResults, figures: list[tuple[str, str, bytes]]) -> None:
    """The same report as a page; cells' tables stay in report.md."""
    found = points(results)
    page.heading("Where MoNE wins")
    page.bullets(where_mone_wins(found))
    for _, caption, png in figures:
        page.figure(png, caption)
    page.heading("Goals")
    page.table(GOALS, goal_rows(results, found))
    page.bullets(above_ceiling(found))
    page.table(WINS, [_win(point) for point in found])
    page.heading("How it was measured")
    page.bullets(METHODS[results.settings.compared])
    page.bullets([f"{name}: {value}" for name, value in _machine(results)])
    page.code(results.command)


def cell_table(rows: list[Row]) -> list[str]:
    """Markdown lines of one cell: those that ran, then a line for each that did not."""
    return [*_rows(rows), "", *_remarks(rows)]


def _rows(rows: list[Row]) -> list[str]:
    ran = [row for row in rows if row.available and row.name != AUTO]
    return _table(TABLE, [_cells(row) for row in ran], text_columns=1)


def _common_remarks(results: RaceResults) -> list[str]:
    """What is to be said of every cell, to be said once."""
    said = [_remarks(cell.results) for cell in results.cells]
    return [line for line in said[0] if all(line in lines for lines in said)] if said else []


def _remarks(rows: list[Row]) -> list[str]:
    """Who did not run and why, who disagrees, and what `auto` is."""
    reasons: dict[str, str] = {}
    for row in rows:
        if row.reason:
            reasons[row.name] = ("" if row.available else "not run: ") + row.reason
    same = {row.same_as for row in rows if row.name == AUTO}
    lines = [f"- {name}: {reason}" for name, reason in reasons.items()]
    return lines + [f"- {AUTO}: is {name} here" for name in sorted(same)]


def _cells(row: Row) -> list[str]:
    def spread(phase: str) -> str:
        low, high = getattr(row, f"{phase}_ms_p10"), getattr(row, f"{phase}_ms_p90")
        return f"{low:.3g} .. {high:.3g}"

    return [
        row.name,
        "dense" if row.ratio is None else fraction(row.ratio),
        f"{row.forward_ms:.4g}",
        spread("forward"),
        _or_dash(row.ratio_to_best_dense_forward, ".2f"),
        f"{row.forward_backward_ms:.4g}",
        spread("forward_backward"),
        _or_dash(row.ratio_to_best_dense, ".2f"),
        _or_dash(row.limit_forward_backward_ms, ".3g"),
        f"{row.saved_bytes / 1e6:.4g}",
        f"{row.peak_bytes / 1e6:.4g}",
        _or_dash(row.error, ".1e"),
        str(row.repeats),
    ]


def _win(point: Point) -> list[str]:
    return [
        point.config.label,
        fraction(point.ratio),
        point.mone.name,
        point.best.name,
        f"{point.forward:.2f}",
        _goal(point, "forward"),
        f"{point.forward_backward:.2f}",
        _goal(point, "forward_backward"),
        f"{point.limit:.2f}",
        f"{point.saved:.2f}",
    ]


def _goal(point: Point, phase: Phase) -> str:
    goal = point.goals[phase]
    return "-" if goal is None else f"{goal:.2f}, {'above' if point.above(phase) else 'met'}"


def _machine(results: RaceResults) -> list[tuple[str, str]]:
    peaks = results.peaks
    rates = ", ".join(f"{value / 1e9:,.0f} GFLOP/s {name}" for name, value in peaks.flops.items())
    measured = f"{rates}, copy {peaks.bandwidth / 1e9:.1f} GB/s"
    settings = results.settings
    return [
        *results.machine.items(),
        ("Measured peaks", measured),
        ("Repeats", f"at least {settings.repeats}, until {settings.seconds:g} s a cell"),
    ]


def _doubts(results: RaceResults) -> list[str]:
    """Cells that are no comparison; a warning where something ran faster than the roofline says is
    possible."""
    rows = [row for cell in results.cells for row in cell.results if row.available]
    beaten = sum(row.forward_backward_ms < row.limit_forward_backward_ms for row in rows)
    unfair, rates = sum(only_slow_bf16(c, results) for c in results.cells), results.peaks.flops
    texts = []
    if unfair:
        texts.append(
            f"{unfair} of {len(results.cells)} cells are no comparison and are left out here: "
            f"their dense peers multiplied in bf16 alone, with {rates['bf16'] / 1e9:,.0f} GFLOP/s, "
            f"where this machine does {rates['fp32'] / 1e9:,.0f} in float32."
        )
    if beaten:
        texts.append(
            f"{beaten} of {len(rows)} times lie below the roofline: the peaks were measured while "
            "the machine was busy, or the rows fit a cache. Do not read the roofline."
        )
    return texts


def _or_dash(value: float | None, shown: str) -> str:
    return "-" if value is None else format(value, shown)


def _table(header: tuple[str, ...], rows: list[list[str]], text_columns: int) -> list[str]:
    rule = ["---" if i < text_columns else "--:" for i in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (list(header), rule, *rows)]
