"""results.json of a race (`megatron-mone bench experts`): the classes that write it and read it.

docs/KERNELS.md has the fields. benchmarking/ races and shows; measured.py makes `auto`'s table of
it. Touches no file but the one it is given.
"""

from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from megatron_mone.common.checked_json import Fault, number
from megatron_mone.common.documents import (
    AnyText,
    AtLeast1,
    Document,
    Key,
    Kind,
    Part,
    Positive,
    Signed,
    Text,
    Whole,
    Words,
    one_of,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By their names in commands and files."""
ROUTINGS = ("balanced", "skewed")
AGAIN = "a benchmark's results come from megatron-mone bench experts --out DIR"


def _number_or_null(value: Any) -> float | None:
    return None if value is None else number(value)


_measured = Kind("number, null where it did not run", _number_or_null)
Measured = Annotated[float, _measured]
NumberOrNull = Annotated[float, Kind("number or null", _number_or_null)]
"""Written as float, since readers ask rows that ran."""


class Settings(Part):
    """How cells were timed."""

    seconds: Positive
    """for the repeats of a cell"""
    repeats: AtLeast1
    """the least number"""
    threads: AtLeast1
    """of torch"""
    compared: Annotated[str, one_of(("median", "p10"))] = "median"
    """of whose repeats ratios are"""


class Peaks(Document, again=AGAIN, indent=1):
    """Measured on this machine with this number of threads."""

    flops: dict[Key, Positive]
    """operations a second of one large square product, by dtype"""
    bandwidth: Positive
    """bytes a second, read and written, of one large copy"""


class CellConfig(Part):
    """What was raced."""

    tokens: Whole
    """N, routed rows"""
    hidden: AtLeast1
    """H"""
    neurons: AtLeast1
    """F, of an expert"""
    experts: AtLeast1
    """E"""
    ratios: list[Positive]
    """the r = S / F of each MoNE entry"""
    dtype: Annotated[str, one_of(tuple(DTYPES))]
    routing: Annotated[str, one_of(ROUTINGS)]
    neuron_block: AtLeast1 = 1
    """B neurons chosen together"""

    @property
    def shape(self) -> str:
        """For people, without the block."""
        return (
            f"N {self.tokens}, H {self.hidden}, F {self.neurons}, E {self.experts}, {self.dtype}, "
            f"{self.routing}"
        )

    @property
    def label(self) -> str:
        """The cell in words."""
        return self.shape + (f", blocks of {self.neuron_block}" if self.neuron_block > 1 else "")


IN_FLOAT32 = "-fp32"
"""Ends the name of a dense peer that multiplies in float32 in a bf16 cell."""


class Row(Part):
    """One implementation; times are ms, the median and two percentiles of the repeats.

    p10 is near the least time, which other processes of the machine do not lengthen.
    """

    name: Text
    dense: bool
    """whether it computes all neurons"""
    ratio: Positive | None
    """the r of a MoNE entry"""
    available: bool
    """whether it ran"""
    agrees: bool
    """with the reference, on the neurons it chose"""
    reason: Words | None
    """why it did not run, or how it disagrees"""
    timed: AnyText
    """beside the experts' products"""
    forward_ms: Measured
    forward_ms_p10: Measured
    forward_ms_p90: Measured
    forward_backward_ms: Measured
    forward_backward_ms_p10: Measured
    forward_backward_ms_p90: Measured
    repeats: Measured
    saved_bytes: Measured
    """kept for the backward, beside inputs and weights"""
    peak_bytes: Measured
    """the most that torch's allocator handed out"""
    peak_forward_bytes: Measured
    peak_backward_bytes: Measured
    error: NumberOrNull
    """relative norm of the difference from the reference; null where it is no number"""
    gradient_error: NumberOrNull
    overlap: Measured
    """share of the reference's neurons that it chose too"""
    same_as: Text = ""
    """of `mone-auto`: the entry it is a copy of"""
    ratio_to_best_dense: NumberOrNull
    """of forward and backward, to the fastest dense peer that agrees; null without one"""
    ratio_to_best_dense_forward: NumberOrNull
    limit_forward_ms: NumberOrNull
    """the least that the peaks allow"""
    limit_forward_backward_ms: NumberOrNull

    @property
    def in_float32(self) -> bool:
        """Whether it multiplies in float32 whatever the cell's dtype."""
        return self.name.endswith(IN_FLOAT32)

    @model_validator(mode="after")
    def _ran(self) -> Self:
        if self.dense != (self.ratio is None):
            raise Fault("must be null in a dense row, and only there", "ratio")
        if self.available or self.agrees:
            for name in MEASURED:
                if getattr(self, name) is None:
                    raise Fault("is null in a row that is available", name)
        return self


MEASURED = tuple(name for name, field in Row.model_fields.items() if _measured in field.metadata)
NUMBERS = tuple(name for name, field in Row.model_fields.items() if field.annotation is float)
"""Fields that are null until they are found."""


class CellResults(Document, again=AGAIN, indent=1):
    """One cell, and every implementation in it."""

    config: CellConfig
    rows_of_experts: list[Whole]
    results: list[Row]

    @property
    def agreeing(self) -> list[Row]:
        """Rows that ran and agree, each once."""
        return [row for row in self.results if row.agrees and not row.same_as]


class PartTime(Part):
    """What is done beside the products, and what it is a part of, in ms."""

    part: Text
    of: Text
    """by what it is divided"""
    config: CellConfig
    """with the one r"""
    ms: Signed
    of_ms: Positive

    @property
    def share(self) -> float:
        """Of the whole."""
        return self.ms / self.of_ms


class PartTimes(Document, again=AGAIN, indent=1):
    """Parts of one machine's layers."""

    parts: list[PartTime]


class LeftOut(Part):
    """A cell that would not have fitted into memory."""

    config: CellConfig
    reason: Words


class RaceResults(Document, again=AGAIN):
    """A grid of cells."""

    command: AnyText
    """that makes the same numbers"""
    settings: Settings
    machine: dict[Key, AnyText]
    """where it ran, by label"""
    peaks: Peaks
    cells: list[CellResults]
    skipped: list[LeftOut]
    parts: list[PartTime] = Field(default_factory=list)
    """of a layer, on a CPU"""


class CellFile(Document, again=AGAIN, indent=1):
    """What `--json` writes of a single cell."""

    config: dict[Key, Any]
    """as in `cells`, with one `ratio`; the rows of the experts and the settings"""
    machine: dict[Key, AnyText]
    peaks: Peaks
    results: list[Row]
