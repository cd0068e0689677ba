"""The command line of the race: one cell, or a grid with a report."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from megatron_mone.common.exit_status import INTERRUPTED, USER_ERROR
from megatron_mone.common.progress import progress_bar

CELL = {"tokens": 4096, "hidden": 512, "neurons": 1408, "experts": 8, "ratio": 0.25,
        "dtype": "fp32", "routing": "balanced"}  # fmt: skip
"""What one cell is where an option is not given."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        print(f"bench_experts: error: {message}", file=sys.stderr)
        raise SystemExit(USER_ERROR)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = _Parser(
        prog="bench_experts",
        description="Race MoNE's experts against dense MoE experts, on the GPU where there is one.",
        allow_abbrev=False,
    )
    one = parser.add_argument_group("one cell (any of these options asks for it)")
    one.add_argument("--tokens", type=int, help="N, routed rows (4096)")
    one.add_argument("--hidden", type=int, help="H (512)")
    one.add_argument("--neurons", type=int, help="F, neurons of one expert (1408)")
    one.add_argument("--experts", type=int, help="E (8)")
    one.add_argument("--ratio", type=_ratio, help="r = S / F, 0.25 or 1/4 (0.25)")
    one.add_argument("--dtype", help="fp32 or bf16 (fp32)")
    one.add_argument("--routing", help="balanced, or skewed as in a recorded run (balanced)")
    one.add_argument("--json", type=Path, help="write the numbers to this file")
    grid = parser.add_argument_group("a grid")
    grid.add_argument("--grid", choices=["quick", "full"], help="which cells (quick)")
    grid.add_argument("--out", type=Path, help="folder of the report (out/bench)")
    parser.add_argument("--neuron-block", type=int, default=1,
                        help="B adjacent neurons chosen together (1)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="of torch (its own choice)")
    parser.add_argument("--repeats", type=int, default=5, help="least repeats (5)")
    parser.add_argument("--seconds", type=float, default=6.0, help="for repeats of a cell (6)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, 2 after a user's mistake, 130 when interrupted."""
    parser = build_parser()
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.simplefilter("ignore")  # of the peers' imports
    logging.disable(logging.WARNING)
    try:
        cells, grid = _checked(options)
    except ValueError as error:
        parser.error(str(error))
    try:
        return _grid(options, cells) if grid else _one(options, cells[0])
    except KeyboardInterrupt:
        again = "; run the same command again to go on" if grid else ""
        print(f"bench_experts: interrupted{again}", file=sys.stderr)
        return INTERRUPTED


def _checked(options: argparse.Namespace) -> tuple[list[Any], bool]:
    """(cells, whether they are a grid), everything checked that can be before a measurement."""
    given = [name for name in (*CELL, "json") if getattr(options, name) is not None]
    grid = options.grid is not None or options.out is not None or not given
    if grid and given:
        raise ValueError(f"--{given[0]} asks for one cell: drop it, or drop --grid and --out")
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats} is not allowed: it must be at least 1")
    if not 0.0 < options.seconds < 1e6:
        raise ValueError(f"--seconds {options.seconds:g} is not allowed: it must be above 0")
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads {options.threads} is not allowed: it must be at least 1")
    options.out = options.out or Path("out/bench")
    if grid:
        _check_folder("--out", options.out)
    elif options.json is not None:
        if options.json.is_dir():
            raise ValueError(f"--json {options.json} is a folder: name a file")
        _check_folder("--json", options.json.parent)

    from megatron_mone.benchmarking.cases import Cell
    from megatron_mone.benchmarking.grid import GRIDS

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


def _settings(options: argparse.Namespace) -> Any:
    import torch

    from megatron_mone.benchmarking.grid import Settings

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return Settings(options.seconds, options.repeats, torch.get_num_threads())


def _one(options: argparse.Namespace, cell: Any) -> int:
    from megatron_mone.benchmarking import environment
    from megatron_mone.benchmarking.grid import with_limits
    from megatron_mone.benchmarking.machine_limits import best_of, measure_peaks
    from megatron_mone.benchmarking.race import run_cell
    from megatron_mone.benchmarking.report import cell_table
    from megatron_mone.common.files import write_json

    settings = _settings(options)
    device = environment.device()
    machine = environment.describe()
    peaks = measure_peaks(device)
    rows = run_cell(cell, device, seconds=settings.seconds, repeats=settings.repeats)
    peaks = best_of(peaks, measure_peaks(device))
    with_limits(rows, cell, peaks)
    config = cell.as_dict()
    config["ratio"] = config.pop("ratios")[0]
    content = {
        "config": {**config, "rows_of_experts": cell.counts, **asdict(settings)},
        "machine": machine,
        "peaks": asdict(peaks),
        "results": rows,
    }
    print(f"{cell.label}, {machine['Processor']}, {settings.threads} threads")
    print("\n".join(cell_table(rows)))
    if options.json is not None:
        write_json(options.json, content)
    return 0


def _grid(options: argparse.Namespace, cells: list[Any]) -> int:
    from megatron_mone.benchmarking.grid import Store, run_grid
    from megatron_mone.benchmarking.report import write_report
    from megatron_mone.reporting.page.results import save_json

    settings = _settings(options)
    store = Store(options.out, settings)
    kept = sum(store.load(cell) is not None for cell in cells)
    if kept:
        print(f"going on: {kept} of {len(cells)} cells were measured before", flush=True)
    with _progress(len(cells)) as on_cell:
        results = run_grid(cells, options.out, settings, on_cell)
    results = {"command": _command(options), **results}
    save_json(options.out / "results.json", results)
    print(f"report: {write_report(options.out, results)}")
    return 0


def _command(options: argparse.Namespace) -> str:
    """The command line that makes the same numbers; no folder of this machine in it."""
    words = ["python tools/bench_experts.py", "--grid", options.grid or "quick"]
    for name in ("neuron_block", "repeats", "seconds"):
        words += [f"--{name.replace('_', '-')}", f"{getattr(options, name):g}"]
    return " ".join(words + (["--threads", str(options.threads)] if options.threads else []))


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal, a line a cell elsewhere."""
    columns = ("{task.description:<48}", "bar", "count", "elapsed", "ETA", "left")
    with progress_bar(*columns, first="building", stream=sys.stdout) as bar:

        def on_cell(done: int, cell: Any, state: str) -> None:
            bar(done, total, cell.label)
            if not bar.drawn or state not in ("kept", "measured"):
                print(f"{done}/{total} {cell.label}: {state}", flush=True)

        yield on_cell


def _ratio(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number like 0.25 or 1/4") from None


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
