"""The training runs of a study: jobs of `launch`, in folders named by what they are made from.

Equal runs of two studies are one folder, trained once. Several are trained at a time, each by its
own `launch run`, which goes on with a run that was stopped. May touch: the folder of runs, child
processes.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.runs.run_manifest import digest
from launch.spec.file import read_fields
from launch.spec.training_job import training_job
from megatron_mone.common.child_processes import tied
from megatron_mone.common.files import atomic_write
from megatron_mone.common.local_ranks import error_line, last_lines
from megatron_mone.common.machine import cores
from megatron_mone.demo.runs import PYTHON, DemoRun, TrainingError, ensure_run, finished
from megatron_mone.reporting.page.results import RunResult
from megatron_mone.studies.study import Cell, Preset

RANKS = 1
"""Of a run: a small model is trained faster by more runs at a time than by more ranks."""
_NAME = 16  # digits of a digest
Train = Callable[[DemoRun], None]
Say = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Wanted:
    """A run of a study.

    Attributes:
        cell: whose it is.
        seed: of its draws and the order of its data.
        run: the job; its name is of what it is made from.
    """

    cell: Cell
    seed: int
    run: DemoRun


def wanted(
    cells: Sequence[Cell], preset: Preset, seeds: int, data: Path, out: Path
) -> list[Wanted]:
    """The runs of a grid, seed by seed, so that a study that is stopped has whole pairs.

    Args:
        cells: of the grid.
        preset: its size.
        seeds: of each cell.
        data: prefix of the prepared data.
        out: folder of all studies.

    Raises:
        ValueError: arguments that a run refuses; one line.
    """
    return [
        Wanted(cell, seed, _run(cell, preset, seed, data, out))
        for seed in range(1, seeds + 1)
        for cell in cells
    ]


def values_of(cell: Cell, preset: Preset, seed: int) -> dict[str, Any]:
    """Megatron's arguments of a run."""
    values = {**preset.values, **cell.values, "seed": seed}
    return {name: value for name, value in values.items() if value is not None}


def _run(cell: Cell, preset: Preset, seed: int, data: Path, out: Path) -> DemoRun:
    values = values_of(cell, preset, seed)
    text = yaml.safe_dump({"model": values}, sort_keys=True)
    config = out / "configs" / f"{digest(values)[:_NAME]}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    if not config.is_file():
        atomic_write(config, text.encode())
    runs = out / "runs"
    words = ["--data-path", f"{data}_text_document", "--tokenizer-model", f"{data}.tokenizer"]
    site = {**read_fields("local"), "tasks_per_node": RANKS}
    job = training_job(config, "nameless", runs, words, (), site)
    name = digest(DemoRun(job).made_from)[:_NAME]
    job = training_job(config, name, runs, words, (), site)
    command = (
        PYTHON, "-m", "launch", "run", "--config", str(config), "--name", name,
        "--runs", str(runs), "--tasks-per-node", str(RANKS), "--", *words,
    )  # fmt: skip
    return DemoRun(job, command)


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
    say(len(by_name) - len(missing), len(by_name), "trained before")
    started = _Children()
    train_one = _apart(train or started.train)
    with ThreadPoolExecutor(max(1, cores() // RANKS)) as pool:
        todo = {pool.submit(ensure_run, one.run, train_one, _quiet): one for one in missing}
        try:
            while todo:
                done, _ = wait(todo, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    one = todo.pop(future)
                    results[one.run.name] = future.result()
                    what = f"{one.cell.name}, seed {one.seed}"
                    say(len(by_name) - len(todo), len(by_name), what)
        except BaseException:  # before the pool waits for its threads, and they for the children
            for future in todo:
                future.cancel()
            started.stop()
            raise
    found = [results[one.run.name] for one in runs]
    return [result for result in found if result is not None]


def _quiet(step: int, loss: float) -> None:
    """Steps of a run are in its own log."""


def _apart(train: Train) -> Callable[..., None]:
    return lambda run, on_step: train(run)


class _Children:
    """Trainings under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def train(self, run: DemoRun) -> None:
        """Train a run to its end by `launch run`, one thread of arithmetic a rank."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *run.command[1:]]
        log = run.folder.parent / f"{run.name}.log"
        with self._lock:
            if self._stopped:
                raise TrainingError(f"{run.name} was not started")
            with log.open("wb") as file:
                child = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                    preexec_fn=tied(),
                )  # fmt: skip
            self._running.append(child)
        status = child.wait()
        with self._lock:
            self._running.remove(child)
        if status:
            said = error_line([log]) or last_lines(log)
            raise TrainingError(f"{run.name}: {said}\nlog: {os.path.relpath(log)}")
        log.unlink()

    def stop(self) -> None:
        """Ask all to save and end, and wait for them."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for child in running:
            child.send_signal(signal.SIGTERM)
        for child in running:
            child.wait()


def values_shown(cell: Cell) -> dict[str, str]:
    """A cell's arguments as JSON texts."""
    return {name: json.dumps(value) for name, value in cell.values.items()}
