"""A study's page: what its numbers support and what they do not, all of results.json."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from megatron_mone.reporting.page.html import Page
from megatron_mone.reporting.page.plots import SETTINGS, save
from megatron_mone.studies.document import StudyCell, StudyResults
from megatron_mone.studies.findings import share
from megatron_mone.studies.statistics import Estimate
from megatron_mone.studies.study import Section, Study

_HEADER = ("cell", "loss", "over the reference", "active GFLOP", "executed GFLOP", "never kept")


def study_page(study: Study, results: StudyResults, plots: Path) -> str:
    """The page as HTML.

    Args:
        study: its words.
        results: its numbers.
        plots: folder that gets each picture as PNG and SVG too.
    """
    page = Page(f"Study {study.name}")
    page.paragraph(study.question)
    page.heading("What the runs say")
    page.bullets(study.findings(results))
    page.heading("What they do not say")
    size = study.presets.get(results.preset)
    page.bullets((size and size.limits) or study.limits)
    if results.cells:
        _cells(page, results, plots)
    for number, section in enumerate(study.sections(results)):
        _section(page, section, plots / f"section-{number + 1}")
    page.heading("How")
    page.paragraph(_size(results))
    for command in results.commands:
        page.code(command)
    return page.render()


def _cells(page: Page, results: StudyResults, plots: Path) -> None:
    page.heading("The cells")
    page.table(_HEADER, rows(results))
    seeds = max(len(cell.runs) for cell in results.cells)
    page.paragraph(
        f"Validation loss after the last step in nats a token, mean of up to {seeds} seeds with a "
        f"95% interval (Student's t); over {results.reference}: paired by seed, whose runs read "
        "the same data in the same order. Operations are of a step, of all ranks. Of "
        f"{len(results.comparable) - 1} intervals one in twenty leaves out 0 by chance alone."
    )
    if others := [cell for cell in results.cells if cell.corpus]:
        named = "; ".join(f"{cell.name}: {cell.corpus}" for cell in others)
        page.paragraph(f"Of another text, and compared with none of these losses: {named}.")
    page.figure(save(_ends(results), plots / "ends"), "Loss over the reference, seed by seed.")
    page.figure(save(_curves(results), plots / "curves"), "Validation loss by step, mean of seeds.")
    page.bullets([f"{cell.name}: {cell.meaning}" for cell in results.cells])


def _section(page: Page, section: Section, plot: Path) -> None:
    page.heading(section.heading)
    for text in section.paragraphs:
        page.paragraph(text)
    if section.figure:
        draw, caption = section.figure
        with plt.rc_context(SETTINGS):
            page.figure(save(draw(), plot), caption)
    if section.table:
        page.table(*section.table)


def _size(results: StudyResults) -> str:
    """How large the runs were, and how long they took."""
    sizes = {(run.steps, run.tokens_per_step) for cell in results.cells for run in cell.runs}
    each = "; ".join(f"{steps:,} steps of {tokens:,} tokens" for steps, tokens in sorted(sizes))
    runs = f"{each} a run. " if each else ""
    return (
        f"Preset {results.preset}: {runs}All steps took {results.seconds:,.0f} s, one run after "
        f"another, on {results.machine}."
    )


def rows(results: StudyResults) -> list[list[str]]:
    """The table's rows, in the grid's order."""
    found = []
    for cell in results.cells:
        run, against = cell.runs[0], ""
        compares = cell.name != results.reference and cell in results.comparable
        if compares and results.has(results.reference):
            against = interval(results.difference(cell.name, results.reference), "+.4f")
        found.append([
            cell.name, interval(cell.loss, ".4f"), against,
            f"{run.active_flops_per_step / 1e9:.1f}", f"{run.executed_flops_per_step / 1e9:.1f}",
            share(cell) if run.chooses else "",
        ])  # fmt: skip
    return found


def interval(found: Estimate, form: str) -> str:
    """A mean and its interval as text."""
    if found.half_width is None:
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} \u00b1 {found.half_width:.4f}"


def _ends(results: StudyResults) -> Figure:
    """By cell: its loss over the reference's, a point a seed, and the interval of their mean."""
    cells = list(reversed(results.comparable))
    reference = results.cell(results.reference).losses()
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.42 * len(cells)))
        for height, cell in enumerate(cells):
            over = [
                loss - reference[seed] for seed, loss in cell.losses().items() if seed in reference
            ]
            axes.plot(over, [height] * len(over), "o", color="#0072B2", alpha=0.5, markersize=4)
            found = results.difference(cell.name, results.reference)
            axes.errorbar(
                found.mean, height, xerr=found.half_width or 0.0, fmt="|", color="#D55E00",
                capsize=3, markersize=9,
            )  # fmt: skip
        axes.axvline(0, color="#999999", linewidth=0.8)
        axes.set_yticks(range(len(cells)), [cell.name for cell in cells])
        axes.set_xlabel(f"nats a token over {results.reference}")
        figure.tight_layout()
    return figure


def _curves(results: StudyResults) -> Figure:
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(8, 4))
        for cell in results.comparable:
            steps, losses = _mean_curve(cell)
            axes.plot(steps, losses, marker="o", markersize=3, label=cell.name)
        axes.set_xlabel("step")
        axes.set_ylabel("validation loss, nats a token")
        axes.legend(frameon=False, fontsize=8)
        figure.tight_layout()
    return figure


def _mean_curve(cell: StudyCell) -> tuple[Sequence[int], Sequence[float]]:
    steps = [point.step for point in cell.runs[0].validation]
    losses = [
        sum(run.validation[n].loss for run in cell.runs) / len(cell.runs) for n in range(len(steps))
    ]
    return steps, losses
