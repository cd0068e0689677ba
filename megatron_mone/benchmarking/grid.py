"""Many cells: which ones, each kept as a file when it is done, so that a run can go on.

OUT/cells/KEY.json holds one cell; KEY is a digest of the cell and of all that its numbers depend on
(environment.fingerprint), so that another machine, thread count, version or kernel measures anew.
"""

import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megatron_mone.benchmarking import environment
from megatron_mone.benchmarking.cases import Cell
from megatron_mone.benchmarking.machine_limits import PHASES, limit_ms, measure_peaks
from megatron_mone.benchmarking.race import run_cell
from megatron_mone.kernels.race_results import (
    AGAIN,
    CellResults,
    LeftOut,
    Peaks,
    RaceResults,
    Row,
    Settings,
)

RATIOS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
DEMO_SHAPE = (512, 1408, 8)
SHAPES = (  # (H, F, E)
    DEMO_SHAPE,
    (2048, 1024, 64),  # OLMoE-1B-7B
    (2048, 768, 128),  # Qwen3-30B-A3B
    (2048, 1408, 64),  # DeepSeek-V2-Lite
    (2560, 1280, 64),  # SonicMoE's published shape
)
TOKENS = (8, 32, 128, 512, 2048, 4096, 8192, 16384)
OnCell = Callable[[int, Cell, str], None]
"""(cells done, the cell, "measured", "kept" or a reason why it was left out)."""


def quick_grid(neuron_block: int) -> list[Cell]:
    """A few minutes on two cores: one shape, three sizes, one skewed size; bf16 without the
    largest, which takes minutes by itself on a processor without bf16 units."""
    cells = [_cell(n, DEMO_SHAPE, "fp32") for n in (64, 512, 4096)]
    cells += [_cell(n, DEMO_SHAPE, "bf16") for n in (64, 512)]
    cells.append(_cell(4096, DEMO_SHAPE, "fp32", "skewed"))
    return [replace(cell, neuron_block=neuron_block) for cell in cells]


def full_grid(neuron_block: int) -> list[Cell]:
    """Every shape, size, dtype and routing, smallest weights first."""
    return [
        replace(_cell(n, shape, dtype, routing), neuron_block=neuron_block)
        for shape in SHAPES
        for dtype in ("fp32", "bf16")
        for routing in ("balanced", "skewed")
        for n in TOKENS
    ]


GRIDS = {"quick": quick_grid, "full": full_grid}


def _cell(tokens: int, shape: tuple[int, int, int], dtype: str, routing: str = "balanced") -> Cell:
    return Cell(tokens, *shape, RATIOS, dtype, routing)


def run_grid(
    cells: list[Cell],
    out: Path,
    settings: Settings,
    on_cell: OnCell = lambda *_: None,
    *,
    command: str = "",
) -> RaceResults:
    """Measure the cells that OUT does not hold yet.

    A cell that would not fit into free memory is left out with that reason.
    """
    device = environment.device()
    store = Store(out, settings)
    peaks = store.peaks(device)
    measured, skipped = [], []
    for done, cell in enumerate(cells, start=1):
        found, state = store.load(cell), "kept"
        if found is None:
            needed, free = cell.bytes_needed(), environment.free_bytes()
            if needed > free:
                state = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
                skipped.append(LeftOut(config=cell.config, reason=state))
            else:
                rows = run_cell(cell, device, seconds=settings.seconds, repeats=settings.repeats)
                found, state = store.save(cell, rows), "measured"
                gc.collect()
        if found is not None:
            rows = with_limits(found.results, cell, peaks)
            measured.append(found.model_copy(update={"results": rows}))
        on_cell(done, cell, state)
    return RaceResults(command=command, settings=settings, machine=environment.describe(),
                       peaks=peaks, cells=measured, skipped=skipped)  # fmt: skip


def with_limits(rows: list[Row], cell: Cell, peaks: Peaks) -> list[Row]:
    """The rows with `limit_PHASE_ms`, the least time that the measured peaks allow."""
    return [
        row.model_copy(
            update={
                f"limit_{phase}_ms": limit_ms(cell, row.ratio, phase, peaks) for phase in PHASES
            }
        )
        for row in rows
    ]


class Store:
    """Finished cells and the peaks, as files that are whole or absent."""

    def __init__(self, out: Path, settings: Settings) -> None:
        self.folder = out / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fingerprint = environment.fingerprint(settings.plain())

    def path(self, cell: Cell) -> Path:
        """Where a cell's rows are kept."""
        text = json.dumps([self.fingerprint, cell.config.plain()], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def load(self, cell: Cell) -> CellResults | None:
        """What is kept of a cell; None if nothing is."""
        try:
            return CellResults.read(self.path(cell), AGAIN)
        except ValueError:
            return None

    def save(self, cell: Cell, rows: list[Row]) -> CellResults:
        """Keep a cell's rows."""
        found = CellResults(config=cell.config, rows_of_experts=cell.counts, results=rows)
        found.write(self.path(cell))
        return found

    def peaks(self, device: torch.device) -> Peaks:
        """The machine's peaks, measured once for all its cells."""
        path = self.folder / f"peaks-{self.fingerprint}.json"
        try:
            return Peaks.read(path, AGAIN)
        except ValueError:
            peaks = measure_peaks(device)
            peaks.write(path)
            return peaks
