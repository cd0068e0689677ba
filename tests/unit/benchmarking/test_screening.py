"""Who falls behind with few rows is not raced with many, and its row says so."""

from dataclasses import replace

import pytest

from megatron_mone.benchmarking.adapters import MoNE, TorchGroupedMM, TorchLoop
from megatron_mone.benchmarking.adapters.in_float32 import InFloat32
from megatron_mone.benchmarking.cases import Cell
from megatron_mone.benchmarking.screening import Screen
from megatron_mone.kernels.race_results import Peaks
from tests.unit.benchmarking.conftest import RATIOS, absent_row, make_cell

CELL = Cell(128, 32, 64, 4, tuple(RATIOS))
EVEN = Peaks(flops={"fp32": 1e11, "bf16": 1e11}, bandwidth=1e10)


def _screen(*cells, peaks=EVEN) -> Screen:
    screen = Screen(peaks)
    for cell in cells:
        screen.note(cell)
    return screen


@pytest.mark.parametrize(("rows", "left_out"), [(256, True), (512, True), (1024, False)])
def test_a_tenth_is_made_good_with_each_doubling(rows, left_out):
    """torch-loop takes 1.25 of the fastest dense peer's time: 1.1 ** 3 is the first above."""
    screen = _screen(make_cell(128, "fp32", {0.5: 4.0, 0.25: 2.0}))
    reason = screen.why_out(TorchLoop(), replace(CELL, tokens=rows))
    assert (reason == "not timed again: took 1.25 of the fastest's time at N 128") == left_out
    assert screen.why_out(TorchGroupedMM(), replace(CELL, tokens=rows)) is None


@pytest.mark.parametrize(("rows", "left_out"), [(32, True), (64, True), (128, False)])
def test_of_few_rows_a_doubling_makes_half_good(rows, left_out):
    """16 rows are 4 of an expert; the reference took 5.6 times as long as the fastest."""
    few = make_cell(16, "fp32", {0.5: 4.0, 0.25: 2.0})
    slow = few.results[-1].model_copy(
        update={"name": "mone-reference", "forward_ms_p10": 9.0, "forward_backward_ms_p10": 10.0}
    )
    few = few.model_copy(update={"results": [*few.results, slow]})
    cell, reference = replace(CELL, tokens=rows), MoNE("reference", 0.25)
    assert (_screen(few).why_out(reference, cell) is not None) == left_out
    between = make_cell(64, "fp32", {0.5: 4.0, 0.25: 2.0})
    row = absent_row("mone-reference", "not timed again: took 5.56", 0.25)
    between = between.model_copy(update={"results": [row]})  # says nothing of more rows
    assert (_screen(few, between).why_out(reference, cell) is not None) == left_out


def test_few_rows_another_cell_and_a_rival_at_another_r_say_nothing():
    slow = make_cell(64, "fp32", {0.5: 4.0, 0.25: 2.0})  # 16 rows of an expert
    assert _screen(slow).why_out(TorchLoop(), CELL) is None
    other = make_cell(128, "fp32", {0.5: 4.0, 0.25: 2.0})
    screen = _screen(other)
    assert screen.why_out(TorchLoop(), replace(CELL, tokens=256, routing="skewed")) is None
    assert screen.why_out(MoNE("cpu", 0.5), replace(CELL, tokens=256)) is None
    assert screen.why_out(TorchLoop(), CELL) is None  # not by its own size


def test_a_backend_of_mone_is_held_against_the_others_at_its_r():
    cell = make_cell(128, "fp32", {0.5: 4.0, 0.25: 2.0})
    slow = cell.results[-1].model_copy(
        update={"name": "mone-reference", "forward_ms_p10": 9.0, "forward_backward_ms_p10": 9.0}
    )
    screen = _screen(cell.model_copy(update={"results": [*cell.results, slow]}))
    wide = replace(CELL, tokens=256)
    assert "took 5.00" in (screen.why_out(MoNE("reference", 0.25), wide) or "")
    assert screen.why_out(MoNE("reference", 0.5), wide) is None
    assert screen.why_out(MoNE("cpu", 0.25), wide) is None


def test_who_was_left_out_stays_out_and_who_could_not_run_is_asked_again():
    first = make_cell(128, "fp32", {0.5: 4.0, 0.25: 2.0})
    reason = "not timed again: took 1.25 of the fastest's time at N 128"
    rows = [row for row in first.results if row.name != "torch-loop"]
    config = first.config.model_copy(update={"tokens": 256})
    second = first.model_copy(
        update={"config": config, "results": [*rows, absent_row("torch-loop", reason)]}
    )
    screen = _screen(first, second)
    assert screen.why_out(TorchLoop(), replace(CELL, tokens=4096)) == reason
    failed = second.model_copy(update={"results": [absent_row("torch-loop", "failed")]})
    assert screen.why_out(TorchLoop(), replace(CELL, tokens=512)) == reason
    assert _screen(first, failed).why_out(TorchLoop(), replace(CELL, tokens=256)) == reason


def test_slow_bf16_leaves_its_float32_form():
    slow = Peaks(flops={"fp32": 1e11, "bf16": 4e10}, bandwidth=1e10)
    half = replace(CELL, dtype="bf16")
    screen = _screen(peaks=slow)
    assert "multiplies bf16, 40 GFLOP/s here, where float32 has 100" in (
        screen.why_out(TorchLoop(), half) or ""
    )
    assert screen.why_out(InFloat32(TorchLoop()), half) is None
    assert screen.why_out(MoNE("cpu", 0.25), half) is None
    assert screen.why_out(TorchLoop(), CELL) is None
    assert screen.why_out(TorchLoop(), replace(half, tokens=64)) is None
    assert _screen().why_out(TorchLoop(), half) is None
