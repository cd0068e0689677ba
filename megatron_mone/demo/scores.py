"""What the demo's checkpoints score on the offline tasks: `megatron-mone eval` of each, at once.

Scores stand in a run's folder, like those of any run; what is there is not asked for again. May
touch: child processes, the folders of runs.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from launch.runs.kept_runs import PYTHON, KeptRun, TrainingError
from launch.spec.training_job import CHECKPOINTS
from megatron_mone.checkpoint.tracker import ITERATION_FORMAT
from megatron_mone.common.child_processes import tied
from megatron_mone.common.machine import version
from megatron_mone.evaluation.results import FILE, place_in_run, read_results
from megatron_mone.reporting.demo.report import Scores

TASKS = "quick"


def score(runs: Sequence[KeptRun]) -> Scores:
    """Evaluate each run's last checkpoint on one rank, all at the same time.

    Raises:
        TrainingError: an evaluation failed.
        ValueError: its results cannot be read.
    """
    commands = tuple(_command(run) for run in runs)
    if not version("lm-eval"):
        return Scores({}, commands)
    places = {
        run.name: place_in_run(run.folder, ITERATION_FORMAT.format(run.steps), TASKS) / FILE
        for run in runs
    }
    _evaluate([run for run in runs if not places[run.name].is_file()])
    return Scores({name: read_results(file) for name, file in places.items()}, commands)


def _command(run: KeptRun) -> tuple[str, ...]:
    folder = os.path.relpath(run.folder / CHECKPOINTS)
    return (PYTHON, "-m", "megatron_mone", "eval", "--load", folder, "--tasks", TASKS)


def _evaluate(runs: Iterable[KeptRun]) -> None:
    with ExitStack() as stack:
        started = []
        for run in runs:
            process = subprocess.Popen(
                [sys.executable, *_command(run)[1:]], stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, preexec_fn=tied(),
            )  # fmt: skip
            stack.callback(process.kill)
            started.append((run, process))
        for run, process in started:
            _, said = process.communicate()
            if process.returncode:
                raise TrainingError(
                    f"{run.name}: no scores, {shlex.join(_command(run))} ended with status "
                    f"{process.returncode}:\n{said.strip()}"
                )
