"""What a study declares: cells of a grid, presets of a size, and what it says of the results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mone.studies.document import StudyResults

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model of a grid, trained once a seed.

    Attributes:
        name: shown; unique in its study.
        meaning: what it is there for, a few words.
        values: Megatron's arguments over the preset's; None takes one of those away.
    """

    name: str
    meaning: str
    values: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """The size at which a study is run.

    Attributes:
        values: Megatron's arguments of every run, but those of the cells.
        seeds: of each cell.
        only: names of the cells; all when empty.
    """

    values: Values
    seeds: int = 3
    only: tuple[str, ...] = ()


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
    """

    name: str
    question: str
    presets: Mapping[str, Preset]
    cells: Callable[[Values], Sequence[Cell]]
    reference: str
    findings: Callable[[StudyResults], list[str]]
    limits: tuple[str, ...]

    def grid(self, preset: Preset) -> list[Cell]:
        """The cells that a preset trains."""
        cells = self.cells(preset.values)
        return [cell for cell in cells if not preset.only or cell.name in preset.only]
