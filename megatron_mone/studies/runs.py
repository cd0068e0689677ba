"""The training runs of a study: jobs of `launch`, in folders named by what they are made from.

Equal runs of two studies are one folder, trained once. Several are trained at a time, each by its
own `launch run`, which goes on with a run that was stopped. May touch: the folder of runs.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.runs.kept_runs import PYTHON, KeptRun, ensure_run, finished
from launch.runs.run_manifest import digest
from launch.spec.file import read_fields
from launch.spec.training_job import CHECKPOINTS, job_of_values
from megatron_mone.common.files import atomic_write
from megatron_mone.common.machine import cores
from megatron_mone.common.progress import Say
from megatron_mone.reporting.page.results import RunResult
from megatron_mone.studies.children import Children, all_of
from megatron_mone.studies.study import Cell, Preset

RANKS = 1
"""Of a run: a small model is trained faster by more runs at a time than by more ranks."""
_NAME = 16  # digits of a digest
Train = Callable[[KeptRun], None]


@dataclass(frozen=True)
class Wanted:
    """A run of a study.

    Attributes:
        cell: whose it is.
        seed: of its draws and the order of its data.
        run: the job; its name is of what it is made from.
        config: its run file, written when it is trained.
        base: the run whose weights it starts from.
    """

    cell: Cell
    seed: int
    run: KeptRun
    config: Path
    base: "Wanted | None" = None

    @property
    def depth(self) -> int:
        """Runs that must be trained before it, one after another."""
        return self.base.depth + 1 if self.base else 0


def wanted(
    cells: Sequence[Cell], preset: Preset, seeds: int, data: Path, out: Path
) -> list[Wanted]:
    """The runs of a grid, seed by seed, so that a study that is stopped has whole pairs.

    Args:
        cells: of the grid.
        preset: its size.
        seeds: of each cell.
        data: prefix of the prepared data; other corpora lie beside it, each by its name.
        out: folder of all studies.

    Raises:
        ValueError: one line: a cell whose base does not stand before it, or arguments that a run
            refuses.
    """
    found: list[Wanted] = []
    for seed in range(1, seeds + 1):
        runs: dict[str, Wanted] = {}
        for cell in cells:
            if cell.after and cell.after not in runs:
                raise ValueError(
                    f"cell {cell.name}: after = {cell.after!r} is no cell before it: "
                    f"{', '.join(runs) or 'it is the first'}"
                )
            runs[cell.name] = _wanted(cell, preset, seed, runs.get(cell.after), data, out)
        found += runs.values()
    return found


def values_of(cell: Cell, preset: Preset, seed: int) -> dict[str, Any]:
    """Megatron's arguments of a run."""
    values = {**preset.values, **cell.values, "seed": seed}
    return {name: value for name, value in values.items() if value is not None}


def _wanted(
    cell: Cell, preset: Preset, seed: int, base: Wanted | None, data: Path, out: Path
) -> Wanted:
    values = values_of(cell, preset, seed)
    config = out / "configs" / f"{digest(values)[:_NAME]}.yaml"
    runs = out / "runs"
    text = data.with_name(cell.corpus or data.name)
    words = ["--data-path", f"{text}_text_document", "--tokenizer-model", f"{text}.tokenizer"]
    if base:  # its name, of what it was made from, is among what this one is made from
        words += ["--pretrained-checkpoint", str(runs / base.run.name / CHECKPOINTS)]
    site = {**read_fields("local"), "tasks_per_node": RANKS}
    job = job_of_values(config, values, "nameless", runs, words, (), site)
    name = digest(KeptRun(job).made_from)[:_NAME]
    job = job_of_values(config, values, name, runs, words, (), site)
    command = (
        PYTHON, "-m", "launch", "run", "--config", str(config), "--name", name,
        "--runs", str(runs), "--tasks-per-node", str(RANKS), "--", *words,
    )  # fmt: skip
    return Wanted(cell, seed, KeptRun(job, command), config, base)


def write_config(one: Wanted) -> None:
    """Write the run file of a run, where it is not there yet; its name did not need it."""
    if not one.config.is_file():
        text = yaml.safe_dump({"model": one.run.job.config["values"]}, sort_keys=True)
        one.config.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(one.config, text.encode())


def train_missing(runs: Sequence[Wanted], say: Say, train: Train | None = None) -> list[RunResult]:
    """The result of each run, trained where it is not there yet, as many at a time as there are
    cores.

    Args:
        runs: of a study; the same run may be there twice.
        say: told runs done, of how many, and of what.
        train: trains one run; by `launch run` when None.

    Raises:
        TrainingError: the first that failed; those under way are stopped.
        KeyboardInterrupt: those under way were stopped; the same call goes on.
    """
    by_name = {one.run.name: one for one in runs}
    results = {name: finished(one.run) for name, one in by_name.items()}
    missing = [by_name[name] for name, result in results.items() if result is None]
    ready = itertools.count(len(by_name) - len(missing))
    say(next(ready), len(by_name), "trained before")

    def ensure(one: Wanted, children: Children) -> None:
        write_config(one)

        def launched(run: KeptRun) -> None:
            children.run(run.command[1:], run.folder.parent / f"{run.name}.log")

        chosen = train or launched
        results[one.run.name] = ensure_run(one.run, lambda run, _: chosen(run), _quiet)

    def told(one: Wanted) -> None:
        say(next(ready), len(by_name), f"{one.cell.name}, seed {one.seed}")

    for depth in sorted({one.depth for one in missing}):
        all_of([one for one in missing if one.depth == depth], ensure, told, cores() // RANKS)
    return [result for one in runs if (result := results[one.run.name]) is not None]


def _quiet(step: int, loss: float) -> None:
    """Steps of a run are in its own log."""


def values_shown(cell: Cell) -> dict[str, str]:
    """A cell's arguments as JSON texts."""
    return {name: json.dumps(value) for name, value in cell.values.items()}
