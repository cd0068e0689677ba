"""Who is not raced in a large cell, by what was measured before: a race's time goes to the fastest.

Two rules, each a reason in the report. A dense peer in bf16 is left out where this machine
multiplies bf16 at less than half its float32 rate, which its float32 form shows better. And who
took longer than the fastest of its kind (dense peers; MoNE's backends at one r) in the same cell
with fewer rows is left out, if not by a tenth for each doubling of the rows between them. Of few
rows a doubling may change more, but not more than twice: no time shrinks, and the fastest's does
not grow faster than the rows.
"""

import math
from dataclasses import replace

from megatron_mone.benchmarking.adapters.base import Adapter
from megatron_mone.benchmarking.adapters.in_float32 import InFloat32
from megatron_mone.benchmarking.cases import Cell
from megatron_mone.kernels.race_results import CellResults, Peaks, Row

MANY_ROWS = 32  # of an expert: with fewer, weights and calls count, and the order may change
SLOW_HALF = 0.5  # of the float32 rate
GAIN, GAIN_OF_FEW = 1.1, 2.0  # what a doubling of the rows may change; of few rows
LEFT_OUT = "not timed again: "


class Screen:
    """The rules on what a grid has measured.

    Args:
        peaks: of this machine.
    """

    def __init__(self, peaks: Peaks) -> None:
        self.peaks, self.rates = peaks, peaks.flops
        self.cells: list[CellResults] = []

    def note(self, cell: CellResults) -> None:
        """Remember a cell's times."""
        self.cells.append(cell)

    def why_out(self, adapter: Adapter, cell: Cell) -> str | None:
        """One line, or None for who is raced."""
        plain = adapter.ratio is None and not isinstance(adapter, InFloat32)
        if _many(cell.tokens, cell) and cell.dtype == "bf16" and plain and self._slow_half():
            return (
                f"multiplies bf16, {self.rates['bf16'] / 1e9:,.0f} GFLOP/s here, where float32 has "
                f"{self.rates['fp32'] / 1e9:,.0f}"
            )
        for before in self._smaller(cell):
            row = _row_of(before, adapter)
            if row is None:
                continue
            if row.available:
                return self._too_slow(row, before, cell)
            left_out = (row.reason or "").startswith(LEFT_OUT)
            if left_out and _many(before.config.tokens, cell):
                return row.reason
        return None

    def _slow_half(self) -> bool:
        return self.rates["bf16"] < SLOW_HALF * self.rates["fp32"]

    def _smaller(self, cell: Cell) -> list[CellResults]:
        """The same cell with fewer rows, the most rows first."""
        like = [
            done
            for done in self.cells
            if replace(cell, tokens=done.config.tokens).config == done.config
            and done.config.tokens < cell.tokens
        ]
        return sorted(like, key=lambda done: -done.config.tokens)

    @staticmethod
    def _too_slow(row: Row, before: CellResults, cell: Cell) -> str | None:
        rivals = [r for r in before.agreeing if r.dense == row.dense and r.ratio == row.ratio]
        if not rivals:
            return None
        doublings = math.log2(cell.tokens / before.config.tokens)
        forward = row.forward_ms_p10 / min(r.forward_ms_p10 for r in rivals)
        both = row.forward_backward_ms_p10 / min(r.forward_backward_ms_p10 for r in rivals)
        if _many(before.config.tokens, cell):
            behind = both > GAIN**doublings and forward > 1.0
        else:
            behind = min(both, forward) > GAIN_OF_FEW**doublings
        if not behind:
            return None
        return f"{LEFT_OUT}took {both:.2f} of the fastest's time at N {before.config.tokens}"


def _many(tokens: int, cell: Cell) -> bool:
    """Whether so many rows are many for the cell's experts."""
    return tokens >= MANY_ROWS * cell.experts


def _row_of(cell: CellResults, adapter: Adapter) -> Row | None:
    rows = [r for r in cell.results if (r.name, r.ratio) == (adapter.name, adapter.ratio)]
    return rows[0] if rows else None
