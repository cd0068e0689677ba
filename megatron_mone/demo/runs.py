"""The demo's training runs: jobs of `launch` in the demo's folder, never repeated and never mixed.

A run's folder holds what the launcher keeps there and, once finished, result.json. The same config
and data skip a finished run and continue an unfinished one from its checkpoint; others start
afresh. May touch: the folders of runs, child processes.
"""

import math
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
from launch.spec.file import read_fields
from launch.spec.megatron_flags import stated
from launch.spec.training_job import TENSORBOARD, Job, training_job
from megatron_mone.common.exit_status import STOPPED
from megatron_mone.common.local_ranks import error_line, last_lines
from megatron_mone.common.machine import load_average
from megatron_mone.common.places import CONFIG_ROOT, ROOT
from megatron_mone.model.run_config import load_run
from megatron_mone.reporting.page.results import RunResult, collect, load_result, save_result

CONFIGS = {"mone": "demo-mone", "moe_total": "demo-moe-total", "moe_active": "demo-moe-active"}
WITHOUT_NG = "mone_without_ng"
WITHOUT_NG_SHARE = 0.4
"""How far the run without NG-LBL goes, as a share of the others' steps."""
PYTHON = ".venv/bin/python"
"""Shown in commands; the demo runs them with its own interpreter."""
_SCALED = ("lr_warmup_iters", "eval_interval", "log_interval", "save_interval")
_OURS = (MANIFEST, "state.json")
"""Marks a folder of the demo's; the second of those that were made without the launcher."""


class TrainingError(RuntimeError):
    """A run failed; the message says why and where its log is."""


@dataclass(frozen=True)
class DemoRun:
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
Train = Callable[[DemoRun, OnStep], None]
"""Trains a run to its end, or raises TrainingError."""


def demo_runs(out: Path, prefix: Path, steps: int | None) -> list[DemoRun]:
    """The three runs and the shorter one without NG-LBL.

    Args:
        out: the demo's folder, from the repository.
        prefix: of the prepared data.
        steps: optimizer steps of each run; None for the configured number.
    """
    data = ["--data-path", f"{prefix}_text_document", "--tokenizer-model", f"{prefix}.tokenizer"]
    runs = []
    for name, model in [*CONFIGS.items(), (WITHOUT_NG, CONFIGS["mone"])]:
        config = CONFIG_ROOT / f"{model}.yaml"
        values = load_run(config)
        flags = scaled_flags(values, steps)
        if name == WITHOUT_NG:
            whole = steps or int(values["train_iters"])
            short = short_steps(whole, int(flags.get("log_interval", values["log_interval"])))
            # The learning rate follows the long run's schedule: only then are equal steps equal.
            flags |= {"train_iters": short, "lr_decay_iters": whole, "mone_ng_loss_coeff": 0}
        words = [*data]
        for flag, value in flags.items():
            words += [f"--{flag.replace('_', '-')}", str(value)]
        command = (PYTHON, "-m", "launch", "run", "--config", str(config.relative_to(ROOT)),
                   "--name", name, "--runs", str(out), "--", *words)  # fmt: skip
        job = training_job(config, name, out, words, (), read_fields("local"))
        runs.append(DemoRun(job, command))
    return runs


def scaled_flags(config: dict[str, Any], steps: int | None) -> dict[str, int]:
    """Megatron arguments that turn a configured run into one of `steps` steps.

    Warm-up and intervals shrink in proportion and are at least 1.
    """
    configured = int(config["train_iters"])
    if steps is None or steps == configured:
        return {}
    share = min(1.0, steps / configured)
    flags = {name: max(1, round(int(config[name]) * share)) for name in _SCALED}
    # A few windows a run, so that the first, which holds the start-up, can be left out.
    flags["log_interval"] = max(1, min(int(config["log_interval"]), steps // 5))
    flags["eval_interval"] = max(flags["eval_interval"], math.ceil(steps / 6))
    return {"train_iters": steps, **flags}


def short_steps(steps: int, log_interval: int) -> int:
    """WITHOUT_NG_SHARE of `steps` in whole logging windows, at least one."""
    windows = max(1, round(WITHOUT_NG_SHARE * steps / log_interval))
    return min(steps, windows * log_interval)


def finished(run: DemoRun) -> RunResult | None:
    """The kept result of `run`, if it was made from just this."""
    result = load_result(run.folder / "result.json")
    return result if result is not None and result.fingerprint == digest(run.made_from) else None


def ensure_run(run: DemoRun, train: Train, on_step: OnStep) -> RunResult:
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


def train_here(run: DemoRun, on_step: OnStep) -> None:
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


def _claim_folder(run: DemoRun) -> None:
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
