"""Many cells: which ones, each kept as a file when it is done, so that a run can go on.

OUT/cells/KEY.json holds one cell; KEY is a digest of the cell and of all that its numbers depend on
(environment.fingerprint), so that another machine, thread count, version or kernel measures anew.
A grid may be measured in pieces of some minutes: each call goes on where the last one stopped.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mone.benchmarking import environment
from megatron_mone.benchmarking.adapters import all_adapters
from megatron_mone.benchmarking.cases import Cell
from megatron_mone.benchmarking.machine_limits import PHASES, limit_ms, measure_peaks
from megatron_mone.benchmarking.part_times import measure_parts
from megatron_mone.benchmarking.race import run_cell
from megatron_mone.benchmarking.screening import Screen
from megatron_mone.kernels.cpu.backend import available
from megatron_mone.kernels.race_results import (
    AGAIN,
    DTYPES,
    ROUTINGS,
    CellResults,
    LeftOut,
    PartTime,
    PartTimes,
    Peaks,
    RaceResults,
    Row,
    Settings,
)
from megatron_mone.profiling.process_memory import keep_freed_blocks

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
OF_ROOFLINE = 0.5  # that implementations reach, about, those that are no match included
SECONDS_TO_BUILD = 5.0  # weights, imports, the check
PARTS_MINUTES = 1.5  # that the parts of a layer take
OnCell = Callable[[int, Cell, str], None]
"""(cells done, the cell, "measured", "kept" or a reason why it was left out)."""


def quick_grid(neuron_block: int) -> list[Cell]:
    """Ten minutes on two cores: one shape, three sizes, both dtypes and routings, and blocks as
    large as what a row keeps of r = 1/4 (single neurons asked for)."""
    kinds = [(dtype, routing) for dtype in DTYPES for routing in ROUTINGS]
    cells = [_cell(n, DEMO_SHAPE, *kind) for kind in kinds for n in (64, 512, 4096)]
    cells = [replace(cell, neuron_block=neuron_block) for cell in cells]
    kept = DEMO_SHAPE[1] // 4
    if neuron_block == 1:
        large = [_cell(4096, DEMO_SHAPE, "fp32", routing) for routing in ROUTINGS]
        cells += [replace(c, neuron_block=kept, ratios=(1 / 2, 1 / 4)) for c in large]
    return cells


def full_grid(neuron_block: int) -> list[Cell]:
    """Every shape, size, dtype and routing, smallest weights first."""
    return [
        replace(_cell(n, shape, dtype, routing), neuron_block=neuron_block)
        for shape in SHAPES
        for dtype in DTYPES
        for routing in ROUTINGS
        for n in TOKENS
    ]


GRIDS = {"quick": quick_grid, "full": full_grid}


def _cell(tokens: int, shape: tuple[int, int, int], dtype: str, routing: str = "balanced") -> Cell:
    return Cell(tokens, *shape, RATIOS, dtype, routing)


@dataclass(frozen=True)
class Stopped:
    """A grid whose minutes were over: cells measured, of how many."""

    measured: int
    cells: int


def run_grid(
    cells: list[Cell],
    out: Path,
    settings: Settings,
    on_cell: OnCell = lambda *_: None,
    *,
    command: str = "",
    minutes: float = math.inf,
) -> RaceResults | Stopped:
    """Measure the cells that OUT does not hold yet.

    A cell that would not fit into free memory is left out with that reason.

    Args:
        cells: checked, each shape's from few rows to many (screening.py).
        out: folder of the report.
        settings: how cells are timed.
        on_cell: told of each.
        command: that makes the same numbers, for the report.
        minutes: no cell is begun that would not end within so many, but the first.
    """
    start = time.monotonic()
    device = environment.device()
    store = Store(out, settings)
    peaks = store.peaks(device)
    screen = Screen(peaks)
    measured: list[CellResults] = []
    skipped: list[LeftOut] = []
    new = 0
    for done, cell in enumerate(cells, start=1):
        found, state = store.load(cell), "kept"
        if found is None:
            needed, free = cell.bytes_needed(), environment.free_bytes()
            if needed > free:
                state = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
                skipped.append(LeftOut(config=cell.config, reason=state))
            else:
                late = time.monotonic() - start + seconds_of_cell(cell, screen, settings, device)
                if new and late > 60 * minutes:
                    return Stopped(len(measured), len(cells))
                with keep_freed_blocks():
                    rows = run_cell(cell, device, seconds=settings.seconds,
                                    repeats=settings.repeats, why_out=screen.why_out)  # fmt: skip
                found, state, new = store.save(cell, rows), "measured", new + 1
        if found is not None:
            screen.note(found)
            rows = with_limits(found.results, cell, peaks)
            measured.append(found.model_copy(update={"results": rows}))
        on_cell(done, cell, state)
    if new and time.monotonic() - start > 60 * (minutes - PARTS_MINUTES):
        return Stopped(len(measured), len(cells))
    return RaceResults(command=command, settings=settings, machine=environment.describe(),
                       peaks=peaks, cells=measured, skipped=skipped,
                       parts=store.parts(device))  # fmt: skip


def minutes_left(cells: list[Cell], store: "Store", settings: Settings) -> tuple[float, float]:
    """About how long the cells take that are not measured yet: with the fastest dense peer alone,
    and with everybody who can run."""
    device = environment.device()
    screen = Screen(store.peaks(device))
    left = []
    for cell in cells:
        found = store.load(cell)
        if found is None:
            left.append(cell)
        else:
            screen.note(found)
    least = sum(_seconds(cell, [None, *cell.ratios], screen.peaks, settings) for cell in left)
    most = sum(seconds_of_cell(cell, screen, settings, device) for cell in left)
    return least / 60 + PARTS_MINUTES, most / 60 + PARTS_MINUTES


def seconds_of_cell(cell: Cell, screen: Screen, settings: Settings, device: torch.device) -> float:
    """About how long a cell takes, by the roofline of everybody who is raced."""
    racing = [
        adapter.ratio
        for adapter in all_adapters(cell)
        if (adapter.why_absent(cell, device) or screen.why_out(adapter, cell)) is None
    ]
    return _seconds(cell, racing, screen.peaks, settings)


def _seconds(cell: Cell, racing: Sequence[float | None], peaks: Peaks, settings: Settings) -> float:
    forward, both = (
        sum(limit_ms(cell, ratio, phase, peaks) for ratio in racing) / 1e3 / OF_ROOFLINE
        for phase in PHASES
    )
    timed = 2 * max(settings.repeats * (forward + both), settings.seconds)  # near the fastest
    return SECONDS_TO_BUILD + 2 * forward + both + timed


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
        self.repeats = settings.repeats

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

    def parts(self, device: torch.device) -> list[PartTime]:
        """Parts of a layer on a CPU, measured once."""
        if device.type != "cpu" or not available()[0]:
            return []
        path = self.folder / f"parts-{self.fingerprint}.json"
        try:
            return PartTimes.read(path, AGAIN).parts
        except ValueError:
            found = PartTimes(parts=measure_parts(self.repeats))
            found.write(path)
            return found.parts
