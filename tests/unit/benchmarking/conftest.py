"""Synthetic rows and results."""

from typing import Any

from megatron_mone.benchmarking.race import with_ratios
from megatron_mone.kernels.race_results import (
    NUMBERS,
    CellResults,
    Peaks,
    RaceResults,
    Row,
    Settings,
)

RATIOS = [0.5, 0.25]


def make_row(name: str, milliseconds: float, ratio: float | None = None, **changes: Any) -> Row:
    """A row that ran: forward takes a third of the time, and kept bytes are the ms in MB."""
    row: dict[str, Any] = {
        "name": name, "dense": ratio is None, "ratio": ratio, "available": True, "agrees": True,
        "reason": None, "timed": "", "repeats": 5, "error": 0.0, "gradient_error": 0.0,
        "overlap": 1.0, "saved_bytes": milliseconds * 1e6, "peak_bytes": milliseconds * 2e6,
        "peak_forward_bytes": milliseconds * 1e6, "peak_backward_bytes": milliseconds * 2e6,
        "ratio_to_best_dense": None, "ratio_to_best_dense_forward": None,
        "limit_forward_ms": 1.0, "limit_forward_backward_ms": 3.0 * (ratio or 1.0),
    }  # fmt: skip
    for phase, share in (("forward", 1 / 3), ("forward_backward", 1.0)):
        median = milliseconds * share
        row |= {f"{phase}_ms": median, f"{phase}_ms_p10": 0.9 * median,
                f"{phase}_ms_p90": 1.2 * median}  # fmt: skip
    return Row(**row | changes)


def absent_row(name: str, reason: str, ratio: float | None = None) -> Row:
    """A row that did not run."""
    return make_row(
        name, 1.0, ratio, available=False, agrees=False, reason=reason, **dict.fromkeys(NUMBERS)
    )


def make_cell(tokens: int, dtype: str, mone: dict[float, float]) -> CellResults:
    """A cell whose dense peers take 8 and 10 ms; `mone` is r -> ms."""
    rows = [
        make_row("torch-grouped-mm", 8.0),
        make_row("torch-loop", 10.0),
        absent_row("scattermoe", "the package scattermoe is not installed"),
        *(make_row("mone-cpu", ms, ratio) for ratio, ms in mone.items()),
    ]
    config = {"tokens": tokens, "hidden": 32, "neurons": 64, "experts": 4, "ratios": RATIOS,
              "dtype": dtype, "routing": "balanced", "neuron_block": 1}  # fmt: skip
    return CellResults(config=config, rows_of_experts=[tokens // 4] * 4, results=with_ratios(rows))


def make_results(**changes: Any) -> RaceResults:
    """Two sizes, two dtypes; MoNE wins at N 64 with r = 1/4 alone."""
    found: dict[str, Any] = {
        "command": "python tools/bench_experts.py --grid quick",
        "settings": Settings(seconds=1.0, repeats=5, threads=2),
        "machine": {"Processor": "a processor", "Threads": "2"},
        "peaks": Peaks(flops={"fp32": 1e11, "bf16": 2e11}, bandwidth=1e10),
        "cells": [
            make_cell(tokens, dtype, {0.5: 12.0, 0.25: 16.0 if tokens == 8 else 4.0})
            for dtype in ("fp32", "bf16")
            for tokens in (8, 64)
        ],
        "skipped": [],
    }
    return RaceResults(**found | changes)
