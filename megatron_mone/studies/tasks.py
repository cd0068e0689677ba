"""What a study measures of trained checkpoints and given models, each measurement made once.

A measurement is a function of ours, called in a process of its own, because a model in Megatron is
the state of a process. What it found is a file named by what it was asked, so that a study that is
stopped goes on, and studies share measurements. May touch: the folder of measurements.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from launch.runs.run_manifest import digest
from megatron_mone.common.documents import AnyText, Document
from megatron_mone.common.files import atomic_write
from megatron_mone.common.progress import Say
from megatron_mone.studies.children import Children, all_of
from megatron_mone.studies.document import Measure

FUNCTIONS = "megatron_mone.studies.measuring"
_NAME = 16  # digits of a digest


@dataclass(frozen=True)
class Task:
    """A measurement.

    Attributes:
        cell: whose it is, or the name of a given model.
        seed: of the run that is measured; 0 of a model that no run of the study trained.
        function: "module:name" under FUNCTIONS; called with `arguments` by name, it
            returns what it measured as `Found`s.
        arguments: JSON values; a path names content, as a run's folder does.
    """

    cell: str
    seed: int
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


Found = tuple[str, Sequence[float], Sequence[float]]
"""What was measured, where (x), and the values (y)."""
Perform = Callable[[Task], Sequence[Found]]


class Measured(
    Document, schema="megatron-mone/study-measurement/1", again="delete it, and run the study again"
):
    """The file of a measurement."""

    asked: AnyText
    measures: list[Measure]


def measure_missing(
    tasks: Sequence[Task], out: Path, say: Say, perform: Perform | None = None
) -> list[Measure]:
    """What all tasks found, measured where it is not there yet.

    Args:
        tasks: of a study.
        out: folder of all studies.
        say: told tasks done, of how many, and of what.
        perform: measures in this process, for tests; a child process a task when None.

    Raises:
        TrainingError: the first that failed; those under way are stopped.
        KeyboardInterrupt: stopped; the same call goes on.
    """
    folder = out / "measurements"
    files = [folder / f"{digest(_asked(task))[:_NAME]}.json" for task in tasks]
    todo = [pair for pair in zip(tasks, files, strict=True) if not pair[1].is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    done = [len(tasks) - len(todo)]
    say(done[0], len(tasks), "measured before")

    def ensure(pair: tuple[Task, Path], children: Children) -> None:
        task, file = pair
        if perform is not None:
            _write(task, file, perform(task))
            return
        asked = file.with_suffix(".task")
        atomic_write(asked, json.dumps(_asked(task)).encode())
        children.run(["-m", __name__, str(asked), str(file)], file.with_suffix(".log"))
        asked.unlink()

    def told(pair: tuple[Task, Path]) -> None:
        done[0] += 1
        say(done[0], len(tasks), f"measured {pair[0].cell}")

    all_of(todo, ensure, told, len(todo))
    return [
        one.model_copy(update={"cell": task.cell, "seed": task.seed})
        for task, file in zip(tasks, files, strict=True)
        for one in Measured.read(file, "delete it, and run the study again").measures
    ]


def _asked(task: Task) -> dict[str, Any]:
    """What decides the numbers: neither the cell's name nor the seed does."""
    return {"function": task.function, "arguments": dict(task.arguments)}


def measures_of(cell: str, seed: int, found: Sequence[Found]) -> list[Measure]:
    """What was found of a cell's run, as documents have it."""
    return [
        Measure(of=of, cell=cell, seed=seed, x=[*map(float, x)], y=[*map(float, y)])
        for of, x, y in found
    ]


def _write(task: Task, file: Path, found: Sequence[Found]) -> None:
    measures = measures_of(task.cell, task.seed, found)
    Measured(asked=json.dumps(_asked(task), sort_keys=True), measures=measures).write(file)


def _child(asked: Path, file: Path) -> None:
    """Measure one task in this process."""
    value = json.loads(asked.read_text(encoding="utf-8"))
    task = Task("anyone", 0, value["function"], value["arguments"])  # who asks puts their name
    module, _, name = task.function.partition(":")
    function = getattr(import_module(f"{FUNCTIONS}.{module}"), name)
    _write(task, file, function(**task.arguments))


if __name__ == "__main__":
    try:
        _child(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(f"megatron-mone: error: {error}")
