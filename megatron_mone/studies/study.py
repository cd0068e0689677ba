"""What a study declares: cells of a grid, presets of a size, what is measured of the runs, and what
it says of the results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_mone.reporting.page.results import RunResult
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.tasks import Found, Task

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model of a grid, trained once a seed.

    Attributes:
        name: shown; unique in its study.
        meaning: what it is there for, a few words.
        values: Megatron's arguments over the preset's; None takes one of those away.
        after: name of a cell before it in the grid, whose last weights of the same seed it starts
            from, with a new optimizer and schedule; random weights when empty.
        corpus: of `prepare --corpus`, the text that it is trained on; the study's when empty.
    """

    name: str
    meaning: str
    values: Values = field(default_factory=dict)
    after: str = ""
    corpus: str = ""


@dataclass(frozen=True)
class Preset:
    """The size at which a study is run.

    Attributes:
        values: Megatron's arguments of every run, but those of the cells.
        seeds: of each cell.
        only: names of the cells; all when empty.
        measuring: sizes of the measurements, by names that the study's tasks know.
        gpus: of a run; 0: it is trained on CPU cores.
        limits: what its results do not say, in place of the study's.
        reference: name of the cell that all are compared with, in place of the study's.
    """

    values: Values
    seeds: int = 3
    only: tuple[str, ...] = ()
    measuring: Values = field(default_factory=dict)
    gpus: int = 0
    limits: tuple[str, ...] = ()
    reference: str = ""


@dataclass(frozen=True)
class Trained:
    """A finished run of a study.

    Attributes:
        cell: whose it is.
        seed: of its draws and the order of its data.
        folder: of the run; its checkpoints are in `checkpoints`.
        result: what its log says.
    """

    cell: Cell
    seed: int
    folder: Path
    result: RunResult


@dataclass(frozen=True)
class Section:
    """A part of a page; all its numbers are of the results.

    Attributes:
        heading: of the part.
        paragraphs: what is shown.
        figure: drawn, and its caption.
        table: header and rows.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    figure: tuple[Callable[[], Figure], str] | None = None
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


@dataclass(frozen=True)
class Study:
    """A question, and how it is answered.

    Attributes:
        name: of the command line.
        question: in a sentence.
        presets: by name.
        cells: of a preset's values.
        reference: name of the cell that all are compared with.
        findings: sentences, of the numbers alone.
        limits: what the results do not say, a sentence each.
        read: what is taken from a run's own record, beside its losses.
        tasks: what is measured of the runs, and of models that were given (name -> folder).
        takes_models: whether models can be given.
        sections: of the page, after the cells.
    """

    name: str
    question: str
    presets: Mapping[str, Preset]
    cells: Callable[[Values], Sequence[Cell]]
    reference: str
    findings: Callable[[StudyResults], list[str]]
    limits: tuple[str, ...]
    read: Callable[[Trained, Preset], Sequence[Found]] = lambda run, preset: ()
    tasks: Callable[[Sequence[Trained], Mapping[str, Path], Preset], Sequence[Task]] = (
        lambda runs, models, preset: ()
    )
    takes_models: bool = False
    sections: Callable[[StudyResults], Sequence[Section]] = lambda results: ()

    def grid(self, preset: Preset) -> list[Cell]:
        """The cells that a preset trains."""
        cells = self.cells(preset.values)
        return [cell for cell in cells if not preset.only or cell.name in preset.only]
