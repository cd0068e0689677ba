"""A study from its grid to its page. May touch: the folder of studies."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mone.common.machine import cores
from megatron_mone.reporting.page.results import RunResult, write_atomically
from megatron_mone.studies.document import Measure, Point, StudyCell, StudyResults, StudyRun
from megatron_mone.studies.page import study_page
from megatron_mone.studies.runs import Say, Train, Wanted, train_missing, values_shown, wanted
from megatron_mone.studies.study import Study, Trained
from megatron_mone.studies.tasks import Perform, measure_missing

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
    folder = out / f"{study.name}-{preset}"
    results = train_missing(runs, say, train)
    trained = [
        Trained(one.cell, one.seed, one.run.folder, result)
        for one, result in zip(runs, results, strict=True)
    ]
    measures = [measure for one in trained for measure in _read(study, one)]
    tasks = study.tasks(trained, models or {}, chosen)
    measures += measure_missing(tasks, out, say, perform) if tasks else []
    seconds = sum(one.steps * statistics.fmean(s for _, s in one.step_seconds) for one in results)
    document = StudyResults(
        study=study.name, preset=preset, reference=study.reference, commands=list(commands),
        machine=f"{cores()} cores of {platform.machine()}", seconds=seconds,
        cells=_cells(runs, results), measures=measures,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    document.write(folder / RESULTS)
    write_page(study, document, folder)
    return document


def write_page(study: Study, document: StudyResults, folder: Path) -> None:
    """The page of results that are there already."""
    write_atomically(folder / PAGE, study_page(study, document, folder).encode())


def _read(study: Study, one: Trained) -> list[Measure]:
    return [
        Measure(of=of, cell=one.cell.name, seed=one.seed, x=[*map(float, x)], y=[*map(float, y)])
        for of, x, y in study.read(one)
    ]


def _cells(runs: Sequence[Wanted], results: Sequence[RunResult]) -> list[StudyCell]:
    by_cell: dict[str, list[StudyRun]] = {}
    cells = {one.cell.name: one.cell for one in runs}
    for one, result in zip(runs, results, strict=True):
        by_cell.setdefault(one.cell.name, []).append(_study_run(one, result))
    return [
        StudyCell(name=name, meaning=cell.meaning, values=values_shown(cell), corpus=cell.corpus,
                  runs=by_cell[name])
        for name, cell in cells.items()
    ]  # fmt: skip


def _study_run(one: Wanted, result: RunResult) -> StudyRun:
    last = [loads[-1] for loads in result.neuron_load.values()]
    neurons = sum(sum(load.histogram.counts) for load in last)
    return StudyRun(
        seed=one.seed, run=one.run.name, steps=result.steps,
        tokens_per_step=result.tokens_per_step,
        active_flops_per_step=result.active_flops_per_step,
        executed_flops_per_step=result.executed_flops_per_step,
        validation=[Point(step=step, loss=loss) for step, loss in result.validation_loss],
        chooses=bool(last), dead_share=sum(load.dead for load in last) / neurons if neurons else 0,
    )  # fmt: skip
