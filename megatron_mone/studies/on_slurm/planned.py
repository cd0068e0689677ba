"""The planned steps of all studies on GPUs (docs/studies/costs.json), and the table of
docs/STUDIES.md that is made of them. May touch: these two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from launch.spec.planned_cost import planned_costs
from megatron_mone.common.documents import Document, Text
from megatron_mone.common.files import atomic_write
from megatron_mone.common.marked_text import with_parts
from megatron_mone.common.places import ROOT
from megatron_mone.common.progress import Say
from megatron_mone.studies.catalogue import MODULES, study_of
from megatron_mone.studies.on_slurm.costs import (
    PlannedStep,
    StudyCost,
    planned_digest,
    planned_values,
    study_cost,
)
from megatron_mone.studies.study import Preset, Study

COSTS = ROOT / "docs" / "studies" / "costs.json"
TEXT = ROOT / "docs" / "STUDIES.md"
CLUSTER = "h100-ndr"
_HEADER = ("study", "preset", "runs", "GPUs a run", "tokens", "GPU hours", "longest run, hours",
           "peak, GiB")  # fmt: skip


class PlannedSteps(
    Document, schema="megatron-mone/planned-steps/1", again="delete it, and plan again", indent=1
):
    """costs.json: steps as the planner predicts them, none of them run on a GPU."""

    cluster: Text
    """Hardware, of configs/cluster/hardware."""
    steps: list[PlannedStep]


def grids() -> Iterator[tuple[Study, str, Preset]]:
    """Every preset on GPUs of every study."""
    for name in MODULES:
        study = study_of(name)
        for preset, chosen in study.presets.items():
            if chosen.gpus:
                yield study, preset, chosen


def planned_steps() -> list[PlannedStep]:
    """Those that are kept."""
    if not COSTS.is_file():
        return []
    return PlannedSteps.read(COSTS, "delete it, and plan again").steps


def plan_missing(asked: Sequence[str], say: Say) -> None:
    """Plan what is not planned yet, one cell after another, keeping each; then write the table.

    Args:
        asked: "STUDY-PRESET"; all when empty.
        say: told cells planned, of how many, and of what.

    Raises:
        ValueError: one line; a cell is refused, or does not fit.
    """
    known = {one.planned: one for one in planned_steps()}
    for study, name, preset in grids():
        if asked and f"{study.name}-{name}" not in asked:
            continue
        todo = {}
        for cell in study.grid(preset):
            values = planned_values(cell, preset)
            if planned_digest(values) not in known:
                todo[planned_digest(values)] = (f"{study.name}-{name}: {cell.name}", values)
        found = planned_costs([*todo.values()], preset.gpus, CLUSTER, say) if todo else ()
        for digested, cost in zip(todo, found, strict=True):
            known[digested] = PlannedStep(planned=digested, **asdict(cost))
            PlannedSteps(cluster=CLUSTER, steps=[*known.values()]).write(COSTS)
    atomic_write(TEXT, with_costs(TEXT.read_text(encoding="utf-8")).encode())


def costs() -> Iterator[tuple[Study, str, StudyCost | None]]:
    """The cost of every preset on GPUs; None of one that is not planned whole."""
    known = planned_steps()
    have = {one.planned for one in known}
    for study, name, preset in grids():
        needed = {planned_digest(planned_values(cell, preset)) for cell in study.grid(preset)}
        whole = needed <= have
        yield (
            study,
            name,
            study_cost(study, name, preset.seeds, CLUSTER, lambda *said: None, known=known)
            if whole
            else None,
        )


def with_costs(text: str) -> str:
    """A text with its table of costs written anew."""
    lines = [f"| {' | '.join(_HEADER)} |", f"|{' --- |' * 2}{' --: |' * (len(_HEADER) - 2)}"]
    for study, preset, cost in costs():
        row = [f"`{study.name}`", f"`{preset}`"]
        if cost is None:
            row += ["not planned yet", *[""] * (len(_HEADER) - 3)]
        else:
            longest = max(cost.hours(cell) for cell in cost.cells)
            row += [f"{cost.runs}", f"{cost.gpus}", f"{cost.total_tokens / 1e9:,.0f}B",
                    f"{cost.total_gpu_hours:,.0f}", f"{longest:,.1f}",
                    f"{cost.peak_gib:.1f} of {cost.limit_gib:.1f}"]  # fmt: skip
        lines.append(f"| {' | '.join(row)} |")
    return with_parts(text, "costs", lambda of: "\n".join(lines))
