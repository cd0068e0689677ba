"""The race as a command asks for it: one cell, or a grid with a report."""

import logging
import math
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_mone.benchmarking import environment
from megatron_mone.benchmarking.cases import Cell
from megatron_mone.benchmarking.grid import (
    GRIDS,
    OnCell,
    Stopped,
    Store,
    minutes_left,
    run_grid,
    with_limits,
)
from megatron_mone.benchmarking.machine_limits import best_of, measure_peaks
from megatron_mone.benchmarking.options import Asked
from megatron_mone.benchmarking.race import run_cell
from megatron_mone.benchmarking.report import cell_table, write_report
from megatron_mone.common.exit_status import INTERRUPTED, STOPPED
from megatron_mone.common.progress import progress_bar
from megatron_mone.kernels.race_results import CellFile, Settings
from megatron_mone.profiling.process_memory import keep_freed_blocks

CELL = {"tokens": 4096, "hidden": 512, "neurons": 1408, "experts": 8, "ratio": 0.25,
        "dtype": "fp32", "routing": "balanced"}  # fmt: skip
"""What one cell is where an option is not given."""
OUT = Path("out/bench")
TIMED = {"quick": (4, 5.0), "full": (2, 3.0)}
"""Least repeats, and seconds for repeats of a cell; both again for who is near the fastest."""


def run(options: Asked, cells: list[Cell], grid: bool) -> int:
    """Measure what `check` answered; 0, 130 when interrupted, 75 after --minutes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.simplefilter("ignore")  # of the peers' imports
    logging.disable(logging.WARNING)
    try:
        return _grid(options, cells) if grid else _one(options, cells[0])
    except KeyboardInterrupt:
        again = "; run the same command again to go on" if grid else ""
        print(f"bench_experts: interrupted{again}", file=sys.stderr)
        return INTERRUPTED


def check(options: Asked) -> tuple[list[Cell], bool]:
    """(cells, whether they are a grid), everything checked that can be before a measurement.

    Raises:
        ValueError: one line naming the option, its value and what is allowed.
    """
    given = [name for name in (*CELL, "json") if getattr(options, name) is not None]
    grid = options.grid is not None or options.out is not None or not given
    if grid and given:
        raise ValueError(f"--{given[0]} asks for one cell: drop it, or drop --grid and --out")
    if options.repeats is not None and options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats} is not allowed: it must be at least 1")
    for name in ("seconds", "minutes"):
        value = getattr(options, name)
        if value is not None and not 0.0 < value < 1e6:
            raise ValueError(f"--{name} {value:g} is not allowed: it must be above 0")
    if options.minutes is not None and not grid:
        raise ValueError(f"--minutes {options.minutes:g} stops a grid: drop it for one cell")
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads {options.threads} is not allowed: it must be at least 1")
    if grid:
        _check_folder("--out", options.out or OUT)
    elif options.json is not None:
        if options.json.is_dir():
            raise ValueError(f"--json {options.json} is a folder: name a file")
        _check_folder("--json", options.json.parent)

    if grid:
        cells = GRIDS[options.grid or "quick"](options.neuron_block)
    else:
        chosen: dict[str, Any] = {
            name: default if getattr(options, name) is None else getattr(options, name)
            for name, default in CELL.items()
        }
        ratio = chosen.pop("ratio")
        cells = [Cell(**chosen, ratios=(ratio,), neuron_block=options.neuron_block)]
    for cell in cells:
        cell.check()
    return cells, grid


def _check_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {folder} cannot be written ({error.strerror}): name another place"
        ) from error


def _settings(options: Asked) -> Settings:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    repeats, seconds = TIMED[options.grid or "quick"]
    return Settings(
        seconds=options.seconds or seconds,
        repeats=options.repeats or repeats,
        threads=torch.get_num_threads(),
        compared="p10",
    )


def _one(options: Asked, cell: Cell) -> int:
    settings = _settings(options)
    device = environment.device()
    machine = environment.describe()
    peaks = measure_peaks(device)
    with keep_freed_blocks():
        rows = run_cell(cell, device, seconds=settings.seconds, repeats=settings.repeats)
    peaks = best_of(peaks, measure_peaks(device))
    config = cell.config.plain()
    (config["ratio"],) = config.pop("ratios")
    config |= {"rows_of_experts": cell.counts, **settings.plain()}
    found = CellFile(
        config=config, machine=machine, peaks=peaks, results=with_limits(rows, cell, peaks)
    )
    print(f"{cell.label}, {machine['Processor']}, {settings.threads} threads")
    print("\n".join(cell_table(found.results)))
    if options.json is not None:
        found.write(options.json)
    return 0


def _grid(options: Asked, cells: list[Cell]) -> int:
    settings, out = _settings(options), options.out or OUT
    store = Store(out, settings)
    kept = sum(store.load(cell) is not None for cell in cells)
    if kept:
        print(f"going on: {kept} of {len(cells)} cells were measured before", flush=True)
    least, most = minutes_left(cells, store, settings)
    print(f"about {least:.0f} to {most:.0f} minutes, by how many fall behind early", flush=True)
    with _progress(len(cells)) as on_cell:
        results = run_grid(cells, out, settings, on_cell, command=_command(options, settings),
                           minutes=options.minutes or math.inf)  # fmt: skip
    if isinstance(results, Stopped):
        print(f"stopped: {results.measured} of {results.cells} cells are measured; run the same "
              "command again to go on")  # fmt: skip
        return STOPPED
    results.write(out / "results.json")
    print(f"report: {write_report(out, results)}")
    return 0


def _command(options: Asked, settings: Settings) -> str:
    """The command line that makes the same numbers; no folder of this machine in it."""
    words = ["python tools/bench_experts.py", "--grid", options.grid or "quick"]
    words += ["--neuron-block", str(options.neuron_block)]
    words += ["--repeats", str(settings.repeats), "--seconds", f"{settings.seconds:g}"]
    if options.instructions is not None:
        words += ["--instructions", options.instructions]
    return " ".join(words + (["--threads", str(options.threads)] if options.threads else []))


@contextmanager
def _progress(total: int) -> Iterator[OnCell]:
    """A bar on a terminal, a line a cell elsewhere."""
    columns = ("{task.description:<48}", "bar", "count", "elapsed", "ETA", "left")
    with progress_bar(*columns, first="building", stream=sys.stdout) as bar:

        def on_cell(done: int, cell: Cell, state: str) -> None:
            bar(done, total, cell.label)
            if not bar.drawn or state not in ("kept", "measured"):
                print(f"{done}/{total} {cell.label}: {state}", flush=True)

        yield on_cell
