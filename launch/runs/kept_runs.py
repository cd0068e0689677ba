"""Training runs whose results are kept: never repeated and never mixed.

A run's folder holds what the launcher keeps there and, once finished, result.json. The same config
and data skip a finished run and continue an unfinished one from its checkpoint; others start
afresh. May touch: the folders of runs, child processes.
"""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.runs.local import run_local, running
from launch.runs.progress import following
from launch.runs.run_manifest import MANIFEST, RunManifest, data_facts, digest, open_run
from launch.runs.start_commands import begun
from launch.spec.megatron_flags import stated
from launch.spec.training_job import TENSORBOARD, Job
from megatron_mone.common.exit_status import STOPPED
from megatron_mone.common.local_ranks import error_line, last_lines
from megatron_mone.common.machine import load_average
from megatron_mone.reporting.page.results import RunResult, collect, load_result, save_result

PYTHON = ".venv/bin/python"
"""Shown in commands; who runs them takes the own interpreter."""
_OURS = (MANIFEST, "state.json")
"""Marks a folder of ours; the second of those that were made without the launcher."""


class TrainingError(RuntimeError):
    """A run failed; the message says why and where its log is."""


@dataclass(frozen=True)
class KeptRun:
    """A run to make.

    Attributes:
        job: of the launcher.
        command: the words that start it by hand, from the repository.
    """

    job: Job
    command: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the run and its folder."""
        return self.job.spec.name

    @property
    def folder(self) -> Path:
        """Where everything of the run is kept."""
        return Path(self.job.spec.folder)

    @property
    def steps(self) -> int:
        """The last optimizer step."""
        return int(stated("train_iters", self.job.config["values"], self.job.config["arguments"]))

    @property
    def made_from(self) -> list[Any]:
        """What decides the result, as a manifest has it: digest of the config, facts of data."""
        return [digest(self.job.config), data_facts(self.job.data)]


OnStep = Callable[[int, float], None]
"""Told (step, training loss in nats) of each line of the log."""
Train = Callable[[KeptRun, OnStep], None]
"""Trains a run to its end, or raises TrainingError."""


def finished(run: KeptRun) -> RunResult | None:
    """The kept result of `run`, if it was made from just this."""
    result = load_result(run.folder / "result.json")
    return result if result is not None and result.fingerprint == digest(run.made_from) else None


def ensure_run(run: KeptRun, train: Train, on_step: OnStep) -> RunResult:
    """The result of `run`, trained only as far as it is not there yet.

    Raises:
        TrainingError: training failed, or the folder is somebody else's.
        ResultError: training ended without writing all that a result needs.
        ValueError: another process runs it.
    """
    if (result := finished(run)) is not None:
        return result
    _claim_folder(run)
    load = load_average()
    train(run, on_step)
    result = collect(
        run.name,
        run.folder / TENSORBOARD,
        steps=run.steps,
        fingerprint=digest(run.made_from),
        command=run.command,
        load_average=max(load, load_average()),
    )
    save_result(run.folder / "result.json", result)
    return result


def train_here(run: KeptRun, on_step: OnStep) -> None:
    """Run the ranks here to their end.

    Raises:
        TrainingError: one of them failed.
        KeyboardInterrupt: they were stopped by a signal to this process.
    """
    failed: list[tuple[Sequence[Path], int]] = []

    def watch(log: Path) -> AbstractContextManager[None]:
        return following(log, lambda step, _, loss: on_step(step, loss))

    with begun(run.job):
        status = run_local(run.job.spec, watch, lambda *what: failed.append(what))
    if status in (STOPPED, 128 + signal.SIGTERM):
        raise KeyboardInterrupt
    for logs, rank in failed:
        said = error_line(logs) or f"training ended with status {status}:\n{last_lines(logs[rank])}"
        raise TrainingError(f"{said}\nlog: {os.path.relpath(logs[rank])}")


def _claim_folder(run: KeptRun) -> None:
    """Keep the folder of an interrupted run of the same making; empty one of another."""
    run.folder.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in run.folder.iterdir() if not entry.name.startswith(".")]
    if entries and not any((run.folder / name).is_file() for name in _OURS):
        raise TrainingError(f"{run.folder} holds files this demo did not write: give another --out")
    with running(run.folder):
        if _made_from(run.folder / MANIFEST) != run.made_from:
            # The marks go last, so that an interrupted removal is finished the next time.
            for entry in sorted(entries, key=lambda entry: entry.name in _OURS):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        open_run(run.folder, run.name, run.job.config, run.job.data)


def _made_from(manifest: Path) -> list[Any] | None:
    try:
        found = RunManifest.read(manifest, RunManifest.AGAIN)
        return [found.config_sha256, found.data]
    except ValueError:
        return None
