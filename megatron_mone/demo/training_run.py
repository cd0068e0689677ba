"""One training run as a child process: started, followed, stopped, and never repeated.

A run's folder holds state.json (the fingerprint of what it is made from), log.txt, checkpoints/,
tensorboard/ and, once finished, result.json. The same fingerprint skips a finished run and
continues an unfinished one from its checkpoint; another fingerprint starts afresh.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_mone.common.child_processes import named_here, tied
from megatron_mone.common.machine import load_average
from megatron_mone.common.step_line import step_of
from megatron_mone.reporting.page.results import (
    RunResult,
    collect,
    load_result,
    save_json,
    save_result,
)

OnStep = Callable[[int, float], None]
"""Called with (step, training loss in nats) for each line of the log."""

_OUR_ERROR = re.compile(r"megatron-mone: error: .*")
_LAUNCHER_GIVES_UP = re.compile(r"closing signal SIGTERM|failed \(exitcode")
_LINES_SHOWN = 15
_SECONDS_TO_STOP = 15.0


class TrainingError(RuntimeError):
    """The child failed; the message says why and where its log is."""


@dataclass(frozen=True)
class RunSpec:
    """A run to make.

    Attributes:
        name: of the run and its folder.
        folder: where everything of the run is kept.
        steps: the last optimizer step.
        config: what decides the result beside the steps: resolved configuration, flags, data.
        command: the words that train it, its `--save`, `--load` and `--tensorboard-dir` included.
    """

    name: str
    folder: Path
    steps: int
    config: dict[str, Any]
    command: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """sha256 of name, steps and config."""
        made_from = {"name": self.name, "steps": self.steps, "config": self.config}
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files."""
        return self.folder / "tensorboard"


Train = Callable[[RunSpec, OnStep], None]
"""Trains a run to its end, or raises TrainingError."""


def finished(spec: RunSpec) -> RunResult | None:
    """The kept result of `spec`, if it was made from just this."""
    result = load_result(spec.folder / "result.json")
    return result if result is not None and result.fingerprint == spec.fingerprint else None


def ensure_run(spec: RunSpec, train: Train, on_step: OnStep) -> RunResult:
    """The result of `spec`, trained only as far as it is not there yet.

    Raises:
        TrainingError: training failed, or the folder is somebody else's.
        ResultError: training ended without writing all that a result needs.
    """
    if (result := finished(spec)) is not None:
        return result
    _claim_folder(spec)
    load = load_average()
    train(spec, on_step)
    load = max(load, load_average())
    result = collect(
        spec.name,
        spec.tensorboard,
        steps=spec.steps,
        fingerprint=spec.fingerprint,
        command=spec.command,
        load_average=load,
    )
    save_result(spec.folder / "result.json", result)
    return result


def _claim_folder(spec: RunSpec) -> None:
    """Keep the folder of an interrupted run of the same fingerprint; empty one of another."""
    state = spec.folder / "state.json"
    if spec.folder.exists() and any(spec.folder.iterdir()):
        if not state.is_file():
            raise TrainingError(
                f"{spec.folder} holds files this demo did not write: give another --out"
            )
        if _fingerprint_in(state) != spec.fingerprint:
            # The state goes last, so that an interrupted removal is finished the next time.
            for entry in spec.folder.iterdir():
                if entry == state:
                    continue
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    save_json(state, {"fingerprint": spec.fingerprint})


def _fingerprint_in(state: Path) -> str | None:
    try:
        return json.loads(state.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError):
        return None


def run_child(command: Sequence[str], log: Path, on_step: OnStep, cwd: Path | None = None) -> None:
    """Run a training command to its end; its output goes to the end of `log`.

    Raises:
        TrainingError: it ended with another status than 0.
    """
    tail: deque[str] = deque(maxlen=_LINES_SHOWN)
    own_error, over = "", False
    with log.open("a", encoding="utf-8") as sink:
        # Its own session: Ctrl-C reaches us alone, and we stop the ranks ourselves.
        child = subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
            env={**os.environ, **named_here()}, preexec_fn=tied(),
        )  # fmt: skip
        try:
            assert child.stdout is not None
            for line in child.stdout:
                sink.write(line)
                sink.flush()
                # What torchrun says after a rank died hides why it died.
                over = over or bool(_LAUNCHER_GIVES_UP.search(line))
                if line.strip() and not over:
                    tail.append(line.rstrip())
                if match := _OUR_ERROR.search(line):
                    own_error = match.group()
                elif found := step_of(line):
                    step, _, loss = found
                    on_step(step, loss)
            status = child.wait()
        except BaseException:
            stop(child.pid)
            child.wait()
            raise
    if status != 0:
        reason = own_error or "\n".join([f"training ended with status {status}:", *tail])
        raise TrainingError(f"{reason}\nlog: {log}")


def stop(pid: int) -> None:
    """End a launcher and its ranks: politely, then, after some seconds, for good."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        # The launcher starts each rank in a session of its own, so a group would miss them.
        ranks = launcher.children(recursive=True)
        for processes, seconds in (([launcher], _SECONDS_TO_STOP), (ranks, _SECONDS_TO_STOP / 5)):
            _end(processes, seconds)


def _end(processes: list[psutil.Process], seconds: float) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
