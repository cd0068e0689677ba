"""What a study on GPUs will cost, by the planner: its document, its page, its line of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launch.runs.run_manifest import digest
from launch.spec.planned_cost import cost_key, memory_gib, planned_costs
from megatron_mone.common.documents import Document, Number, Part, Text, Whole
from megatron_mone.common.progress import Say
from megatron_mone.reporting.page.html import Page
from megatron_mone.studies.catalogue import large
from megatron_mone.studies.runs import values_of
from megatron_mone.studies.study import Cell, Preset, Study

_HEADER = ("cell", "GPUs", "steps", "tokens", "step, ms", "hours a run", "GPU hours a run",
           "GPU hours", "peak, GiB")  # fmt: skip


class PlannedStep(Part):
    """A step of a run, planned; not run."""

    planned: Text
    """Digest of what decides its cost."""
    tokens_per_step: Whole
    step_seconds: Number
    peak_gib: Number
    """Of the fullest rank."""


class CellCost(Part):
    """A cell's runs."""

    name: Text
    steps: Whole
    """Of a run."""
    step: PlannedStep


class StudyCost(
    Document, schema="megatron-mone/study-cost/1", again="render the study again", indent=1
):
    """cost.json of a study on GPUs: predictions of the planner, none of them run on a GPU."""

    study: Text
    preset: Text
    cluster: Text
    """Hardware, of configs/cluster/hardware."""
    gpus: Whole
    """Of each run."""
    seeds: Whole
    """Runs of each cell."""
    vocabulary: Whole
    """Rows of the embedding that were planned with."""
    limit_gib: Number
    """Memory of a GPU."""
    cells: list[CellCost]

    def hours(self, cell: CellCost) -> float:
        """Of one run."""
        return cell.steps * cell.step.step_seconds / 3600

    def gpu_hours(self, cell: CellCost) -> float:
        """Of one run: GPUs x steps x seconds of a step."""
        return self.gpus * self.hours(cell)

    @property
    def runs(self) -> int:
        """Of all cells."""
        return self.seeds * len(self.cells)

    @property
    def total_gpu_hours(self) -> float:
        """Of all runs."""
        return self.seeds * sum(self.gpu_hours(cell) for cell in self.cells)

    @property
    def total_tokens(self) -> int:
        """That all runs read."""
        return self.seeds * sum(cell.steps * cell.step.tokens_per_step for cell in self.cells)

    @property
    def peak_gib(self) -> float:
        """Of the fullest rank of all runs."""
        return max(cell.step.peak_gib for cell in self.cells)


def study_cost(
    study: Study, preset: str, seeds: int, cluster: str, say: Say,
    vocabulary: int = large.VOCABULARY, known: Sequence[PlannedStep] = (),
) -> StudyCost:  # fmt: skip
    """Plan a study's runs.

    Args:
        study: which.
        preset: one with GPUs.
        seeds: of each cell.
        cluster: hardware.
        say: told runs planned, of how many, and of what.
        vocabulary: of the tokenizer.
        known: steps that are not planned again.

    Raises:
        ValueError: one line; Megatron or the planner refuses a cell, or it does not fit.
    """
    chosen = study.presets[preset]
    steps = {one.planned: one for one in known}
    runs = [(cell.name, planned_values(cell, chosen, vocabulary)) for cell in study.grid(chosen)]
    todo = [(name, values) for name, values in runs if planned_digest(values) not in steps]
    if todo:
        found = planned_costs(todo, chosen.gpus, cluster, say)
        for (_, values), cost in zip(todo, found, strict=True):
            digested = planned_digest(values)
            steps[digested] = PlannedStep(planned=digested, **asdict(cost))
    return StudyCost(
        study=study.name, preset=preset, cluster=cluster, gpus=chosen.gpus, seeds=seeds,
        vocabulary=vocabulary, limit_gib=memory_gib(cluster),
        cells=[
            CellCost(name=name, steps=int(values["train_iters"]),
                     step=steps[planned_digest(values)])
            for name, values in runs
        ],
    )  # fmt: skip


def planned_values(
    cell: Cell, preset: Preset, vocabulary: int = large.VOCABULARY
) -> dict[str, Any]:
    """Megatron's arguments of a cell's runs, as they are planned."""
    return {**values_of(cell, preset, seed=1), "vocab_size": vocabulary}


def planned_digest(values: Mapping[str, Any]) -> str:
    """Of what decides the cost of a step."""
    return digest(cost_key(values))[:16]


def total(cost: StudyCost) -> str:
    """In a sentence."""
    return (
        f"{cost.runs} runs of {cost.gpus} GPUs ({cost.cluster}): {cost.total_gpu_hours:,.0f} GPU "
        f"hours, {cost.total_tokens / 1e9:,.0f}B tokens, at most {cost.peak_gib:.1f} of "
        f"{cost.limit_gib:.1f} GiB; predicted, not run"
    )


def cost_page(study: Study, cost: StudyCost, command: str) -> Page:
    """The page beside the scripts, all of `cost`.

    Args:
        study: its words.
        cost: its numbers.
        command: that submits the runs.
    """
    page = Page(f"Study {study.name}, preset {cost.preset}: what it costs")
    page.paragraph(study.question)
    page.warning("Nothing here was run on a GPU: times and memory are the planner's predictions.")
    page.table(_HEADER, [_row(cost, cell) for cell in cost.cells])
    page.paragraph(
        f"In all {total(cost)}. Each cell is trained {cost.seeds} times; "
        f"planned with a vocabulary of {cost.vocabulary:,}."
    )
    page.heading("To run it")
    page.code(command)
    return page


def _row(cost: StudyCost, cell: CellCost) -> list[str]:
    step = cell.step
    return [
        cell.name, f"{cost.gpus}", f"{cell.steps:,}",
        f"{cell.steps * step.tokens_per_step / 1e9:,.1f}B", f"{1e3 * step.step_seconds:,.0f}",
        f"{cost.hours(cell):,.1f}", f"{cost.gpu_hours(cell):,.1f}",
        f"{cost.seeds * cost.gpu_hours(cell):,.0f}",
        f"{step.peak_gib:.1f} of {cost.limit_gib:.1f}",
    ]  # fmt: skip
