"""What `auto` knows of speed: measured times of the backends, looked up, never guessed.

The table is JSON, written from a benchmark of this repository:

    make bench                                                    # out/bench/results.json
    python -m megatron_mone.kernels --table-from out/bench/results.json

or, for a GPU, from out/gpu-answer/answer.json (megatron-mone gpu-answer).

MONE_KERNEL_TABLE names another file, for one's own machines. A cell holds the class of machine,
dtype, rows per expert, kept share S / F, block, and milliseconds of forward + backward of each
backend; a call takes the nearest cell of its class and dtype. May touch: the table's file.
"""

import functools
import json
import math
import os
from pathlib import Path

import torch

from megatron_mone.common.checked_json import load
from megatron_mone.common.documents import AtLeast1, Document, Key, Part, Positive, Text
from megatron_mone.common.files import atomic_write
from megatron_mone.kernels.gpu_answer_results import MONE, REFERENCE, GpuAnswer, LayerTime
from megatron_mone.kernels.race_results import AGAIN, DTYPES, CellResults, RaceResults

TABLE = Path(__file__).with_name("measured.json")
TABLE_ENV = "MONE_KERNEL_TABLE"
PREFIX = "mone-"  # of our backends' names in benchmark results


class MeasuredCell(Part):
    """The backends at one shape and kept share."""

    machine: Text
    dtype: Text
    rows_per_expert: Positive
    kept_share: Positive
    block: AtLeast1
    hidden: AtLeast1 | None = None
    neurons: AtLeast1 | None = None
    ms: dict[Key, Positive]
    """forward + backward, by backend"""


class KernelTable(
    Document,
    again="write one with python -m megatron_mone.kernels --table-from RESULTS, or unset it",
):
    """The file that `auto` looks up."""

    cells: list[MeasuredCell]


@functools.cache
def machine_class(device: str) -> str:
    """What tells machines apart here: the vector set and matrix unit of a CPU ("avx2",
    "avx512+amx"), the compute capability of a GPU ("sm_90")."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    matrix_unit = "+amx" if probe is not None and probe() else ""
    return torch.backends.cpu.get_cpu_capability().lower() + matrix_unit


def nearest_cell(
    device: str, dtype: torch.dtype, rows_per_expert: float, kept_share: float, block: int
) -> MeasuredCell | None:
    """The measured cell closest to a call in log(rows per expert) and log(S / F), or None where
    this class of machine, dtype and kind of block was never measured.

    Raises:
        ValueError: the table is not one.
    """
    like = (machine_class(device), str(dtype).removeprefix("torch."), block)
    return _nearest(os.environ.get(TABLE_ENV) or str(TABLE), like, rows_per_expert, kept_share)


@functools.lru_cache(maxsize=256)  # decoding asks the same thing for every token
def _nearest(
    path: str, like: tuple[str, str, int], rows_per_expert: float, kept_share: float
) -> MeasuredCell | None:
    cells = [c for c in _cells(path) if (c.machine, c.dtype, c.block) == like]
    if not cells:
        return None

    def distance(cell: MeasuredCell) -> float:
        rows = math.log2(max(1.0, rows_per_expert) / cell.rows_per_expert)
        share = math.log2(max(kept_share, 1e-3) / cell.kept_share)
        return rows * rows + 4 * share * share

    return min(cells, key=distance)


def check_table() -> list[MeasuredCell]:
    """The cells in use; read once.

    Raises:
        ValueError: the file that MONE_KERNEL_TABLE names is not a table.
    """
    return _cells(os.environ.get(TABLE_ENV) or str(TABLE))


@functools.cache
def _cells(path: str) -> list[MeasuredCell]:
    if path == str(TABLE) and not TABLE.exists():
        return []
    try:
        return KernelTable.read(Path(path), KernelTable.AGAIN).cells
    except ValueError as error:
        raise ValueError(
            f"{TABLE_ENV} = {path!r} is not a table of kernel times: {error}"
        ) from error


def table_of(results: RaceResults) -> KernelTable:
    """The table of a benchmark's results.

    Raises:
        ValueError: none of our backends ran.
    """
    cells = [
        _measured_cell(cell, ratio)
        for cell in results.cells
        if cell.config.routing == "balanced"
        for ratio in cell.config.ratios
    ]
    cells = [cell for cell in cells if cell.ms]
    if not cells:
        raise ValueError("no backend of ours was measured with balanced routing in these results")
    return KernelTable(cells=cells)


def _measured_cell(cell: CellResults, ratio: float) -> MeasuredCell:
    config = cell.config
    ours = [row for row in cell.agreeing if row.ratio == ratio and row.name.startswith(PREFIX)]
    return MeasuredCell(
        machine=machine_class("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=str(DTYPES[config.dtype]).removeprefix("torch."),
        rows_per_expert=config.tokens / config.experts,
        kept_share=ratio,
        block=config.neuron_block,
        hidden=config.hidden,
        neurons=config.neurons,
        ms={row.name.removeprefix(PREFIX): row.forward_backward_ms for row in ours},
    )


def table_of_answer(answer: GpuAnswer, others: list[MeasuredCell]) -> KernelTable:
    """The table of a GPU's answer: its layers without balance loss and NaN check.

    Args:
        answer: measured on a GPU.
        others: cells in use, of which those of other machines are kept.

    Raises:
        ValueError: it is the interpreter's, or no layer of ours was timed.
    """
    answer.check_measured("table")
    cells: dict[tuple[object, ...], MeasuredCell] = {}
    for row in answer.layers:
        named = {MONE: "triton", REFERENCE: "reference"}.get(row.name)
        if named is None or row.balance_loss or row.nan_check or row.forward_backward_ms is None:
            continue
        known = cells.get(key := _cell_key(row))
        ms = {**({} if known is None else known.ms), named: row.forward_backward_ms}
        cells[key] = MeasuredCell(
            machine=answer.machine_class, dtype=str(DTYPES[row.dtype]).removeprefix("torch."),
            rows_per_expert=row.rows / row.experts, kept_share=row.kept / row.neurons,
            block=row.block, hidden=row.hidden, neurons=row.neurons, ms=ms,
        )  # fmt: skip
    if not cells:
        raise ValueError("no layer of ours was timed in this answer")
    kept = [cell for cell in others if cell.machine != answer.machine_class]
    return KernelTable(cells=[*kept, *cells.values()])


def _cell_key(row: LayerTime) -> tuple[object, ...]:
    return row.rows, row.experts, row.hidden, row.neurons, row.kept, row.block, row.dtype


def write_table(results: Path, table: Path) -> int:
    """Write the table of a benchmark's results, or of a GPU's answer; its number of cells.

    A race's table is its own; an answer's cells go to those of other machines in `table`.

    Raises:
        ValueError: the file cannot be read, or is neither; says which.
    """
    document = load(results, AGAIN)
    try:
        if isinstance(document, dict) and document.get("schema") == GpuAnswer.SCHEMA:
            others = KernelTable.read(table, KernelTable.AGAIN).cells if table.exists() else []
            cells = table_of_answer(GpuAnswer.of(document, results), others).cells
        else:
            cells = table_of(RaceResults.of(document, results)).cells
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(results)) else f"{results}: {text}") from error
    lines = ",\n".join(json.dumps(cell.plain()) for cell in cells)  # to be read and compared
    atomic_write(table, f'{{"cells": [\n{lines}\n]}}\n'.encode())
    return len(cells)
