"""The page of a search over layouts: report.html and its plots, from the search's file.

Writes report.html, plots/NAME.png and plots/NAME.svg under one folder, each whole or not at all.
"""

from pathlib import Path

from megatron_mone.planning.plan_document import Search
from megatron_mone.planning.terminal_tables import axes_tried, not_tried
from megatron_mone.reporting.plan import curves as plan_curves
from megatron_mone.reporting.plan import plots as plan_plots
from megatron_mone.reporting.plan import tables as plan_tables
from megatron_mone.reporting.plan.page import PAGE, PlanPage
from megatron_mone.reporting.plan.view import (
    MOST_TEXT,
    basis,
    gibibytes,
    layout_text,
    title,
    warnings,
)
from megatron_mone.reporting.profile.tables import MOST_ROWS
from megatron_mone.reporting.profile.view import milliseconds, short

_MOST_LAYOUTS = 12  # named of those that are refused for one reason


def write_search_report(search: Search, folder: Path) -> Path:
    """Write report.html and the plots of a search; returns the page's path.

    Args:
        search: drawn.
        folder: where they go; made if it is not there.
    """
    page = PlanPage(title(search, "Search of layouts"), folder)
    page.paragraph(answer(search))
    page.warning(basis(search))
    for text in warnings(search):
        page.warning(text)
    for text in axes_tried(search):
        page.paragraph(f"{text[0].upper()}{text[1:]}.")
    _best(page, search)
    page.plot(
        "candidates", plan_curves.candidates(search),
        "Every layout tried: peak memory and step time; numbers are of the fastest that fit. On "
        "the Pareto front nothing else is both faster and smaller.",
    )  # fmt: skip
    _front(page, search)
    _left_out(page, search)
    return page.write(folder / PAGE)


def answer(search: Search) -> str:
    """How many layouts were tried, how many fit, and the fastest, in one sentence."""
    found = search.candidates
    fit = sum(one.fits for one in found)
    counted = f"{len(found):,} layouts were predicted and {fit:,} fit"
    if search.refused:
        counted += f"; Megatron refuses {len(search.refused):,} more"
    if search.hopeless:
        counted += f"; {len(search.hopeless):,} are too large without any activation"
    if search.not_tried:
        counted += f"; not tried: {not_tried(search)}"
    if not search.best:
        return f"No layout fits: {counted}."
    best = search.best_candidates()[0]
    return (
        f"The fastest layout that fits is {layout_text(best.layout)}: "
        f"{milliseconds(best.step_ms)} ms a step, {best.tokens_per_s_per_gpu:,.0f} tokens/s "
        f"a GPU, {best.peak_gib:,.1f} of {gibibytes(search.cluster.memory_gib)}; "
        f"{counted}."
    )


def refusals(search: Search) -> list[str]:
    """A text a reason, the most frequent first: how many layouts, the reason, some of them."""
    by_reason: dict[str, list[str]] = {}
    for refused in search.refused:
        by_reason.setdefault(refused.reason, []).append(refused.layout)
    return [
        f"{short(reason, MOST_TEXT)}: {_some(layouts)}"
        for reason, layouts in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]


def _some(layouts: list[str]) -> str:
    """ "40 layouts: tp=1,pp=3; tp=1,pp=5; ... and 28 more"."""
    more = len(layouts) - _MOST_LAYOUTS
    named = "; ".join(short(layout, 80) for layout in layouts[:_MOST_LAYOUTS])
    count = "1 layout" if len(layouts) == 1 else f"{len(layouts):,} layouts"
    return f"{count}: {named}{f' and {more:,} more' if more > 0 else ''}"


def _best(page: PlanPage, search: Search) -> None:
    if not search.best:
        return
    page.heading("The fastest that fit")
    table, left = plan_tables.best_table(search)
    page.table(*table)
    if left:
        page.paragraph(f"{left:,} slower ones are left out.")
    page.bullets([
        f"{number}: {short(one.why, MOST_TEXT)}"
        for number, one in enumerate(search.best[:MOST_ROWS], 1)
    ])  # fmt: skip
    page.plot("best", plan_plots.best_bars(search), "Where the step of the fastest goes.")


def _front(page: PlanPage, search: Search) -> None:
    table, left = plan_tables.front_table(search)
    page.titled_table("Pareto front of time against memory", table)
    if left:
        page.paragraph(f"{left:,} slower ones are left out.")


def _left_out(page: PlanPage, search: Search) -> None:
    """What was not predicted, and why; folded, as it may be long."""
    refused, hopeless = search.refused, search.hopeless
    if refused or hopeless:
        page.heading("Not predicted")
    if refused:
        page.folded(f"{len(refused):,} layouts that Megatron refuses", refusals(search))
    if hopeless:
        page.folded("Layouts whose weights, gradients and optimizer alone pass the device's memory",
                    [_some(hopeless)])  # fmt: skip
