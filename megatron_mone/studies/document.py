"""results.json of a study: the numbers of every run, and nothing that is derived of them."""

from megatron_mone.common.documents import AnyText, Difference, Document, Number, Part, Text, Whole
from megatron_mone.studies.statistics import Estimate, difference, estimate


class Point(Part):
    """A validation loss, nats a token, after a step."""

    step: Whole
    loss: Number


class StudyRun(Part):
    """One training run of a cell.

    The run's name is that of its folder: of what it is made from.
    """

    seed: Whole
    run: Text
    steps: Whole
    tokens_per_step: Whole
    active_flops_per_step: Number
    """Of all ranks: operations that kept neurons needed."""
    executed_flops_per_step: Number
    validation: list[Point]
    chooses: bool
    """Whether it chooses among neurons."""
    dead_share: Number
    """Neurons never kept in the last logging window, of all that are chosen among; 0 without."""


class StudyCell(Part):
    """A model of the grid."""

    name: Text
    meaning: Text
    values: dict[str, Text]
    """What it has otherwise than the preset, as JSON."""
    corpus: AnyText = ""
    """Text that it was trained and validated on; the study's when empty."""
    runs: list[StudyRun]

    def losses(self) -> dict[int, float]:
        """Seed -> nats a token after the last step."""
        return {run.seed: run.validation[-1].loss for run in self.runs}

    @property
    def loss(self) -> Estimate:
        """Nats a token after the last step."""
        return estimate(list(self.losses().values()))


class Measure(Part):
    """What was measured of one run, or of a model that was given."""

    of: Text
    """What the values are, with their unit where they have one."""
    cell: Text
    """Whose: a cell's name, or a model's."""
    seed: Whole
    """Of the run; 0 of a given model."""
    x: list[Difference]
    """Where: shares, steps, layers."""
    y: list[Difference]
    """The values, as many as x."""


class StudyResults(Document, schema="megatron-mone/study/1", again="run the study again", indent=1):
    """A study's results."""

    study: Text
    preset: Text
    reference: Text
    """Name of the cell that all are compared with."""
    commands: list[Text]
    """That give these results."""
    machine: Text
    seconds: Number
    """That the steps of all runs took, one run after another."""
    cells: list[StudyCell]
    measures: list[Measure]
    """In the order in which they were asked for."""

    def measured(self, of: str, cell: str) -> dict[int, Measure]:
        """Seed -> what was measured of a cell's runs."""
        return {one.seed: one for one in self.measures if (one.of, one.cell) == (of, cell)}

    def curve(self, of: str, cell: str) -> list[tuple[float, Estimate]]:
        """(x, mean over seeds) of what was measured of a cell, at each x that all seeds have."""
        values = [dict(zip(one.x, one.y, strict=True)) for one in self.measured(of, cell).values()]
        shared = [x for x in values[0] if all(x in one for one in values)] if values else []
        return [(x, estimate([one[x] for one in values])) for x in shared]

    def who(self, of: str) -> list[str]:
        """Cells and models of which this was measured, in order."""
        return list(dict.fromkeys(one.cell for one in self.measures if one.of == of))

    def cell(self, name: str) -> StudyCell:
        """The cell of a name."""
        return next(cell for cell in self.cells if cell.name == name)

    @property
    def comparable(self) -> list[StudyCell]:
        """Cells that were validated on the study's text: losses of two texts are not compared."""
        return [cell for cell in self.cells if not cell.corpus]

    def has(self, *names: str) -> bool:
        """Whether all these cells were trained."""
        return {*names} <= {cell.name for cell in self.cells}

    def difference(self, name: str, against: str) -> Estimate:
        """Nats a token that one cell ends above another, seed by seed."""
        return difference(self.cell(name).losses(), self.cell(against).losses())
