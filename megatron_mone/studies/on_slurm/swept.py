"""A study whose runs are Slurm sweeps: planned and written out, started where that is asked, and
read once all have finished. May touch: the folder of studies, Slurm through `launch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mone.common.progress import Say
from megatron_mone.studies.command import measures_read, written
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.on_slurm.costs import (
    PlannedStep,
    StudyCost,
    cost_page,
    study_cost,
    total,
)
from megatron_mone.studies.on_slurm.sweeps import (
    collected,
    run_here,
    site_of,
    submit,
    sweeps,
    unfinished,
    with_requeues,
    write_scripts,
)  # fmt: skip
from megatron_mone.studies.study import Study
from megatron_mone.studies.tasks import measure_missing

COST, COST_PAGE, JOBS = "cost.json", "cost.html", "jobs"


@dataclass(frozen=True)
class Swept:
    """How the runs of a study are made.

    Attributes:
        site: launch file, a name of configs/launch or a path.
        words: Megatron flags that name the data.
        vocabulary: of the tokenizer, for the plan.
        submits: hand to Slurm what is missing.
        here: run what is missing on this machine's GPU.
        command: that submits, for the pages.
    """

    site: str
    words: Sequence[str]
    vocabulary: int
    submits: bool = False
    here: bool = False
    command: str = ""


def swept_study(
    study: Study, preset: str, seeds: int, how: Swept, out: Path, say: Say
) -> StudyResults | None:
    """Write what a study's runs cost and the scripts of their jobs, start them, read them.

    Args:
        study: which.
        preset: name of its size.
        seeds: of each cell.
        how: its runs are made.
        out: folder of all studies.
        say: told cells planned, of how many, and of what.

    Returns:
        The results; None while runs are missing, of which a line is printed.

    Raises:
        ValueError: the site, a cell or its memory is refused, or Slurm refuses a job; one line.
        SlurmUnavailable: Slurm does not answer.
        ResultError: training ended without writing all that a result needs.
        TrainingError: a run here failed.
    """
    chosen = study.presets[preset]
    site = site_of(how.site, chosen.gpus)
    folder = out / f"{study.name}-{preset}"
    cost = None
    if chosen.gpus:
        cluster = site["planner_cluster"]
        known = _known(folder / COST, cluster)
        cost = study_cost(study, preset, seeds, cluster, say, how.vocabulary, known)
        site = with_requeues(site, max(map(cost.hours, cost.cells)), how.site)
    found = sweeps(study.grid(chosen), chosen, seeds, how.words, out, site)
    write_scripts(found, folder / JOBS)
    if cost is not None:
        cost.write(folder / COST)
        cost_page(study, cost, how.command).write(folder / COST_PAGE)
        print(total(cost))
    print(f"{len(found)} sweeps of {seeds} runs each, scripts in {folder / JOBS}", flush=True)
    if how.submits:
        submit(found)
    if how.here:
        run_here(found)
    if missing := unfinished(found):
        print(missing)
        return None
    trained = collected(found)
    measures = measures_read(study, trained, chosen)
    # Checkpoints of a cluster's size are not read on the machine that submits.
    if tasks := [] if chosen.gpus else study.tasks(trained, {}, chosen):
        measures += measure_missing(tasks, out, say)
    machine = f"{chosen.gpus} GPUs a run" if chosen.gpus else "one core a run"
    return written(
        study, preset, trained, [one.result.name for one in trained], measures, [how.command],
        f"{machine} (site {Path(how.site).stem})", out,
    )  # fmt: skip


def _known(path: Path, cluster: str) -> list[PlannedStep]:
    """Steps that were planned before for the same hardware."""
    if not path.is_file():
        return []
    found = StudyCost.read(path, "delete it, and render the study again")
    return [cell.step for cell in found.cells] if found.cluster == cluster else []
