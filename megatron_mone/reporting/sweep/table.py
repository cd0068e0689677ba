"""The results of a sweep's cases as one table: text, CSV, JSON. A number that is missing is "-".

Losses are nats per token; ratios are to the first row. May touch: reads TensorBoard folders.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from megatron_mone.common.documents import AnyText, Document, Part
from megatron_mone.reporting.page.events import Curve, read_events
from megatron_mone.reporting.page.results import median_after_first

ABSENT = "-"


@dataclass(frozen=True)
class Measured:
    """What one case's TensorBoard folder holds; None and empty where it does not.

    Attributes:
        steps: the last optimizer step with a training loss.
        training_loss, validation_loss: the last ones.
        step_ms: median milliseconds of a step, the first logging window left out.
        tokens_per_second: of all ranks together, at that time.
        tflops_per_rank: executed 1e12 operations a second and rank, median like the time's.
        peak_gib: largest allocated memory of a rank, GiB; on CPU ranks its resident memory.
        training_curve, validation_curve: losses by step.
    """

    steps: int | None = None
    training_loss: float | None = None
    validation_loss: float | None = None
    step_ms: float | None = None
    tokens_per_second: float | None = None
    tflops_per_rank: float | None = None
    peak_gib: float | None = None
    training_curve: Curve = field(default_factory=list)
    validation_curve: Curve = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        case: its folder's name.
        values: argument -> value.
        state: how far it is.
        evaluations: documents of its checkpoints' benchmarks.
    """

    case: str
    values: Mapping[str, str]
    state: str
    measured: Measured
    evaluations: Sequence[Mapping[str, Any]] = ()

    @property
    def label(self) -> str:
        """The values alone, for a plot."""
        return ", ".join(f"{name} = {value}" for name, value in self.values.items()) or self.case


@dataclass(frozen=True)
class _Column:
    """How a measured column is headed, and prints."""

    heading: str
    form: str


class CaseResult(Part):
    """A case of the table; null where a number is missing."""

    case: AnyText
    values: dict[AnyText, AnyText]
    state: AnyText
    steps: Annotated[int | None, _Column("steps", "d")]
    training_loss: Annotated[float | None, _Column("training loss", ".4f")]
    validation_loss: Annotated[float | None, _Column("validation loss", ".4f")]
    validation_loss_ratio: Annotated[float | None, _Column("loss / first", ".4f")]
    step_ms: Annotated[float | None, _Column("ms / step", ".1f")]
    step_ms_ratio: Annotated[float | None, _Column("time / first", ".3f")]
    tokens_per_second: Annotated[float | None, _Column("tokens / s", ",.0f")]
    tflops_per_rank: Annotated[float | None, _Column("TFLOP/s / rank", ".3g")]
    peak_gib: Annotated[float | None, _Column("peak GiB", ".2f")]


class SweepResults(
    Document, schema="megatron-mone/sweep-results/1", again="ask for the results again", indent=1
):
    """results.json: the table for a program."""

    name: AnyText
    """Of the sweep."""
    cases: list[CaseResult]


COLUMNS = {
    key: column
    for key, field in CaseResult.model_fields.items()
    for column in field.metadata
    if isinstance(column, _Column)
}


def measure(folder: Path) -> Measured:
    """Read a case's TensorBoard folder, which may be missing, under way or damaged."""
    try:
        scalars = read_events(folder).scalars
    except (OSError, ValueError):
        return Measured()  # vanished or not readable: as good as missing
    training, validation = scalars.get("lm loss", []), scalars.get("lm loss validation", [])
    seconds = _median(scalars.get("iteration-time"))
    tokens = _tokens_per_step(folder)
    flops = scalars.get("mone/executed_tflops_per_rank") or scalars.get("throughput")
    memory = scalars.get("mem-max-allocated-bytes", [])
    return Measured(
        steps=training[-1][0] if training else None,
        training_loss=training[-1][1] if training else None,
        validation_loss=validation[-1][1] if validation else None,
        step_ms=1e3 * seconds if seconds else None,
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        tflops_per_rank=_median(flops),
        peak_gib=max(value for _, value in memory) / 2**30 if memory else None,
        training_curve=training,
        validation_curve=validation,
    )


def numbers(rows: Sequence[Row]) -> list[dict[str, float | None]]:
    """The measured columns of each row by key; None where a number is missing or is no number."""
    table = []
    for row in rows:
        found = {key: getattr(row.measured, key, None) for key in COLUMNS}
        for key in ("validation_loss", "step_ms"):
            first, own = getattr(rows[0].measured, key), found[key]
            found[f"{key}_ratio"] = own / first if own is not None and first else None
        table.append({key: _finite(value) for key, value in found.items()})
    return table


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table, as text."""
    names = _names(rows)
    heading = [*names, "state", *(column.heading for column in COLUMNS.values())]
    lines = []
    for row, found in zip(rows, numbers(rows), strict=True):
        measured = [_shown(found[key], column.form) for key, column in COLUMNS.items()]
        lines.append([*(row.values.get(name, ABSENT) for name in names), row.state, *measured])
    return heading, lines


def text_lines(rows: Sequence[Row]) -> list[str]:
    """The table for a terminal: words to the left, numbers to the right."""
    heading, lines = cells(rows)
    table = [heading, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(heading))]
    words = len(heading) - len(COLUMNS)
    return [
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """The table for a spreadsheet: full precision, an empty cell where a number is missing."""
    names = _names(rows)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["case", *names, "state", *COLUMNS])
    for row, found in zip(rows, numbers(rows), strict=True):
        own = [row.values.get(name, "") for name in names]
        writer.writerow([row.case, *own, row.state, *found.values()])
    return stream.getvalue().encode()


def results_of(name: str, rows: Sequence[Row]) -> SweepResults:
    """The table for a program.

    Args:
        name: of the sweep.
        rows: of the table.
    """
    cases = [
        CaseResult(case=row.case, values=dict(row.values), state=row.state, **found)  # type: ignore[arg-type]
        for row, found in zip(rows, numbers(rows), strict=True)
    ]
    return SweepResults(name=name, cases=cases)


def _names(rows: Sequence[Row]) -> list[str]:
    """Every argument of any case, in the order they came."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return ABSENT
    return format(int(value) if form == "d" else value, form)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _median(curve: Curve | None) -> float | None:
    return median_after_first(curve) if curve else None


def _tokens_per_step(folder: Path) -> int | None:
    """What pretrain wrote beside the event files."""
    try:
        return int(json.loads((folder / "run.json").read_text(encoding="utf-8"))["tokens_per_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
