"""A study from its grid to its page. May touch: the folder of studies."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mone.common.machine import cores
from megatron_mone.common.progress import Say
from megatron_mone.reporting.page.results import write_atomically
from megatron_mone.studies.document import Measure, Point, StudyCell, StudyResults, StudyRun
from megatron_mone.studies.page import study_page
from megatron_mone.studies.runs import Train, train_missing, values_shown, wanted
from megatron_mone.studies.study import Preset, Study, Trained
from megatron_mone.studies.tasks import Perform, measure_missing, measures_of

RESULTS, PAGE = "results.json", "report.html"


def run_study(
    study: Study, preset: str, seeds: int, data: Path, out: Path, commands: Sequence[str], say: Say,
    train: Train | None = None, perform: Perform | None = None,
    models: Mapping[str, Path] | None = None,
) -> StudyResults:  # fmt: skip
    """Train and measure what is missing of a study and write results.json and report.html.

    Args:
        study: which.
        preset: name of its size.
        seeds: of each cell.
        data: prefix of the prepared data; other corpora lie beside it, each by its name.
        out: folder of all studies; the study's own folder lies in it.
        commands: that are run for this, for the page.
        say: told runs done, of how many, and of what.
        train: trains one run; by `launch run` when None.
        perform: makes one measurement; by a child process when None.
        models: name -> folder, measured beside the runs.

    Raises:
        ValueError: a cell is refused.
        TrainingError: a run failed.
        KeyboardInterrupt: stopped; the same call goes on.
    """
    chosen = study.presets[preset]
    runs = wanted(study.grid(chosen), chosen, seeds, data, out)
    if models and (first := study.tasks((), models, chosen)):
        measure_missing(first, out, say, perform)  # a wrong model is told before hours of training
    results = train_missing(runs, say, train)
    trained = [
        Trained(one.cell, one.seed, one.run.folder, result)
        for one, result in zip(runs, results, strict=True)
    ]
    measures = measures_read(study, trained, chosen)
    tasks = study.tasks(trained, models or {}, chosen)
    measures += measure_missing(tasks, out, say, perform) if tasks else []
    return written(
        study, preset, trained, [one.run.name for one in runs], measures, commands,
        f"{cores()} cores of {platform.machine()}", out,
    )  # fmt: skip


def written(
    study: Study, preset: str, trained: Sequence[Trained], names: Sequence[str],
    measures: Sequence[Measure], commands: Sequence[str], machine: str, out: Path,
) -> StudyResults:  # fmt: skip
    """Write the results of finished runs, and their page.

    Args:
        study: which.
        preset: name of its size.
        trained: its runs.
        names: of their folders.
        measures: what was measured of them.
        commands: that were run for this, for the page.
        machine: on which, in words.
        out: folder of all studies.
    """
    folder = out / f"{study.name}-{preset}"
    seconds = sum(
        one.result.steps * statistics.fmean(s for _, s in one.result.step_seconds)
        for one in trained
    )
    document = StudyResults(
        study=study.name, preset=preset, commands=list(commands),
        reference=study.presets[preset].reference or study.reference,
        machine=machine, seconds=seconds, cells=_cells(trained, names), measures=list(measures),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    document.write(folder / RESULTS)
    write_page(study, document, folder)
    return document


def write_page(study: Study, document: StudyResults, folder: Path) -> None:
    """The page of results that are there already."""
    write_atomically(folder / PAGE, study_page(study, document, folder).encode())


def measures_read(study: Study, trained: Sequence[Trained], preset: Preset) -> list[Measure]:
    """What a study takes from its runs' own records."""
    return [
        measure
        for one in trained
        for measure in measures_of(one.cell.name, one.seed, study.read(one, preset))
    ]


def _cells(trained: Sequence[Trained], names: Sequence[str]) -> list[StudyCell]:
    by_cell: dict[str, list[StudyRun]] = {}
    cells = {one.cell.name: one.cell for one in trained}
    for one, name in zip(trained, names, strict=True):
        by_cell.setdefault(one.cell.name, []).append(_study_run(one, name))
    return [
        StudyCell(name=name, meaning=cell.meaning, values=values_shown(cell), corpus=cell.corpus,
                  runs=by_cell[name])
        for name, cell in cells.items()
    ]  # fmt: skip


def _study_run(one: Trained, name: str) -> StudyRun:
    result = one.result
    last = [loads[-1] for loads in result.neuron_load.values()]
    neurons = sum(sum(load.histogram.counts) for load in last)
    return StudyRun(
        seed=one.seed, run=name, steps=result.steps,
        tokens_per_step=result.tokens_per_step,
        active_flops_per_step=result.active_flops_per_step,
        executed_flops_per_step=result.executed_flops_per_step,
        validation=[Point(step=step, loss=loss) for step, loss in result.validation_loss],
        chooses=bool(last), dead_share=sum(load.dead for load in last) / neurons if neurons else 0,
    )  # fmt: skip
