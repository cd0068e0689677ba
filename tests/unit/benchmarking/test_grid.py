"""A grid goes on where it was, measures anew when something changed, and skips what cannot fit."""

from dataclasses import replace

import pytest

from megatron_mone.benchmarking import environment, grid
from megatron_mone.benchmarking.cases import Cell
from megatron_mone.kernels.race_results import Peaks, Settings
from tests.unit.benchmarking.conftest import make_cell

SETTINGS = Settings(seconds=0.01, repeats=1, threads=1)
CELLS = [Cell(n, 32, 64, 4, (0.5, 0.25)) for n in (8, 64, 128)]


@pytest.fixture
def raced(monkeypatch) -> list[int]:
    """Tokens of the cells that were really raced; every race gives synthetic rows."""
    tokens: list[int] = []

    def race(cell, device, *, seconds, repeats, why_out):
        if len(tokens) == 2 and tokens[-1] != -1:
            tokens.append(-1)
            raise KeyboardInterrupt
        tokens.append(cell.tokens)
        return make_cell(cell.tokens, cell.dtype, {0.5: 4.0, 0.25: 2.0}).results

    monkeypatch.setattr(grid, "run_cell", race)
    monkeypatch.setattr(
        grid, "measure_peaks", lambda device: Peaks(flops={"fp32": 1e9, "bf16": 1e9}, bandwidth=1e9)
    )
    monkeypatch.setattr(grid, "measure_parts", lambda repeats: [])
    return tokens


def test_an_interrupted_grid_goes_on_and_ends_like_one_that_was_not(tmp_path, raced):
    with pytest.raises(KeyboardInterrupt):
        grid.run_grid(CELLS, tmp_path, SETTINGS)
    states: list[str] = []
    results = grid.run_grid(
        CELLS, tmp_path, SETTINGS, lambda done, cell, state: states.append(state)
    )
    assert raced == [8, 64, -1, 128]
    assert states == ["kept", "kept", "measured"]
    assert [cell.config.tokens for cell in results.cells] == [8, 64, 128]
    assert results.cells[0].results[0].limit_forward_ms > 0


@pytest.mark.parametrize("changed", ["settings", "cell", "machine", "damaged"])
def test_what_changed_is_measured_anew(tmp_path, raced, monkeypatch, changed):
    grid.run_grid(CELLS[:1], tmp_path, SETTINGS)
    settings, cells = SETTINGS, CELLS[:1]
    if changed == "settings":
        settings = SETTINGS.model_copy(update={"threads": 2})
    elif changed == "cell":
        cells = [replace(cells[0], neuron_block=2)]
    elif changed == "machine":
        monkeypatch.setattr(environment, "describe", lambda: {
            "Processor": "another", "Date": "", "Load average at the start": ""})  # fmt: skip
    else:
        path = grid.Store(tmp_path, SETTINGS).path(cells[0])
        path.write_text(path.read_text()[:40])
    grid.run_grid(cells, tmp_path, settings)
    assert raced == [8, 8]


def test_a_cell_that_does_not_fit_is_left_out_with_the_reason(tmp_path, raced, monkeypatch):
    monkeypatch.setattr(environment, "free_bytes", lambda: CELLS[0].bytes_needed())
    results = grid.run_grid([replace(CELLS[0], tokens=1 << 20), CELLS[0]], tmp_path, SETTINGS)
    assert raced == [8]
    assert "GiB are free" in results.skipped[0].reason
    assert [cell.config.tokens for cell in results.cells] == [8]


def test_a_grid_in_pieces_is_the_same_grid(tmp_path, raced, monkeypatch):
    """With no minutes left each call measures one cell, and the last one the report's parts."""
    monkeypatch.setattr(grid, "PARTS_MINUTES", 0.0)
    raced += [0, 0, 0]  # so that nothing interrupts
    pieces = [grid.run_grid(CELLS, tmp_path, SETTINGS, minutes=1e-9) for _ in range(4)]
    assert [(piece.measured, piece.cells) for piece in pieces[:3]] == [(1, 3), (2, 3), (3, 3)]
    assert raced[3:] == [8, 64, 128]
    assert [cell.config.tokens for cell in pieces[3].cells] == [8, 64, 128]


def test_minutes_left_fall_to_those_of_the_parts(tmp_path, raced):
    store = grid.Store(tmp_path, SETTINGS)
    least, most = grid.minutes_left(CELLS, store, SETTINGS)
    assert grid.PARTS_MINUTES < least < most
    grid.run_grid(CELLS[:2], tmp_path, SETTINGS)
    fewer = grid.minutes_left(CELLS, store, SETTINGS)
    assert grid.PARTS_MINUTES < fewer[0] < least
    raced.append(0)
    grid.run_grid(CELLS, tmp_path, SETTINGS)
    assert grid.minutes_left(CELLS, store, SETTINGS) == (grid.PARTS_MINUTES,) * 2
