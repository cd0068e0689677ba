"""Cells, routing, timing and the roofline."""

import itertools
import json

import pytest
import torch

from megatron_mone.benchmarking import routing, timing
from megatron_mone.benchmarking.cases import Cell, make_inputs
from megatron_mone.benchmarking.grid import GRIDS
from megatron_mone.benchmarking.machine_limits import (
    bytes_moved,
    limit_ms,
    measure_peaks,
    operations,
)
from megatron_mone.kernels.race_results import ROUTINGS, Peaks


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_of_a_grid_can_be_raced(name):
    cells = GRIDS[name](1)
    for cell in cells:
        cell.check()
    assert len(set(cells)) == len(cells)


def test_inputs_are_the_same_for_the_same_cell_and_down_has_two_layouts():
    cell = Cell(8, 32, 64, 4, (0.25,), "bf16")
    first, second = (make_inputs(cell, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first.x_NH, second.x_NH)
    assert torch.equal(first.gate_up_E2FH, second.gate_up_E2FH)
    assert torch.equal(first.down_EFH, first.down_EHF.transpose(1, 2))
    assert torch.equal(first.in_float32.down_EFH, first.down_EFH.float())
    more = make_inputs(Cell(16, 32, 64, 4, (0.25,), "bf16"), torch.device("cpu"))
    assert more.gate_up_E2FH is first.gate_up_E2FH


@pytest.mark.parametrize(("tokens", "experts"), [(8, 3), (4096, 8), (7, 64), (1, 1)])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_rows_sum_to_the_tokens(kind, tokens, experts):
    counts = routing.rows_of_experts(kind, tokens, experts)
    assert (len(counts), sum(counts)) == (experts, tokens)
    assert min(counts) >= 0
    if kind == "balanced":
        assert max(counts) - min(counts) <= 1


def test_skew_is_that_of_the_recorded_run():
    content = json.loads(routing.RECORDED.read_text(encoding="utf-8"))
    loads = [n * len(c) / sum(c) for c in content["layers"].values() for n in c]
    counts = routing.rows_of_experts("skewed", 100_000, len(loads))
    got = [n * len(counts) / 100_000 for n in counts]
    assert got == pytest.approx(sorted(loads, reverse=True), rel=1e-3)


def test_recording_counts_the_rows_of_each_expert(tmp_path):
    for step, keys in ((3, [0, 1, 5]), (4, [2, 6, 9])):  # pair n of expert n % 4
        folder = tmp_path / f"step-{step:07d}"
        folder.mkdir()
        content = {"manifest": {"num_experts": 4}, "keys_P": torch.tensor(keys)}
        torch.save(content, folder / "layer-002.pt")
    assert routing.record(tmp_path) == {"steps": [3, 4], "layers": {"2": [1, 3, 2, 0]}}
    with pytest.raises(ValueError, match="holds no masks"):
        routing.record(tmp_path / "step-0000003")


def test_each_round_runs_everybody_in_another_order():
    order: list[str] = []
    entries = [{"go": lambda n=n: order.append(n)} for n in "abcd"]
    times = timing.race(entries, seconds=0.0, least=5, warm_up=1)
    rounds = ["".join(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert [sorted(each) for each in rounds] == [list("abcd")] * 6
    assert len(set(rounds)) > 3
    assert [t["go"].repeats for t in times] == [5] * 4


def test_who_is_out_of_sight_runs_the_least_rounds_alone(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    entries = [{"go": lambda: None}] * 2
    times = timing.race(
        entries, seconds=40.0, least=2, warm_up=0, stays=lambda taken: [len(taken) == 2, False]
    )
    assert times[1]["go"].repeats == 2
    assert times[0]["go"].repeats > 5
    times = timing.race(entries, seconds=0.0, least=2, warm_up=0, stays=lambda taken: [True, False])
    assert [each["go"].repeats for each in times] == [4, 2]


def test_repeats_go_on_until_the_time_is_spent(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    times = timing.race([{"go": lambda: None}], seconds=20.0, least=2)
    assert 4 <= times[0]["go"].repeats <= 10


def test_summary_is_the_median_with_percentiles():
    times = timing.summary([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (times.median, times.repeats) == (3.0, 5)
    assert (times.p10, times.p90) == pytest.approx((1.4, 4.6))


def test_operations_and_limit_follow_the_published_counts():
    cell = Cell(4096, 512, 1408, 8, (0.25,))
    dense = {phase: operations(cell, None, phase) for phase in ("forward", "forward_backward")}
    assert dense["forward"] == 2 * 3 * 4096 * 512 * 1408
    assert operations(cell, 0.25, "forward") / dense["forward"] == pytest.approx(0.5)
    both = operations(cell, 0.25, "forward_backward") / dense["forward_backward"]
    assert both == pytest.approx(1 / 3)
    compute_bound = Peaks(flops={"fp32": 1e9}, bandwidth=1e15)
    memory_bound = Peaks(flops={"fp32": 1e18}, bandwidth=1e9)
    assert limit_ms(cell, None, "forward", compute_bound) == pytest.approx(dense["forward"] / 1e6)
    assert limit_ms(cell, None, "forward", memory_bound) == pytest.approx(
        bytes_moved(cell, None, "forward") / 1e6
    )
    slow_half = Peaks(flops={"fp32": 2e9, "bf16": 1e9}, bandwidth=1e15)  # then fp32 is the limit
    half = Cell(4096, 512, 1408, 8, (0.25,), "bf16")
    assert limit_ms(half, None, "forward", slow_half) == pytest.approx(dense["forward"] / 2e6)


def test_bytes_of_a_forward_are_its_weights_and_rows():
    cell = Cell(2, 32, 64, 4, (0.25,))  # two of four experts have a row
    assert bytes_moved(cell, None, "forward") == 4 * (2 * 3 * 64 * 32 + 2 * 2 * 32)
    # one row touches all gates and a quarter of the other vectors
    assert bytes_moved(cell, 0.25, "forward") == 4 * (2 * 1.5 * 64 * 32 + 2 * 2 * 32)


def test_peaks_are_measured():
    peaks = measure_peaks(torch.device("cpu"), elements=1 << 16)
    assert min(peaks.flops["fp32"], peaks.flops["bf16"], peaks.bandwidth) > 1e6


def test_the_ratio_that_a_refusal_names_is_taken():
    with pytest.raises(ValueError, match="422/1408 keeps 422"):
        Cell(64, 512, 1408, 8, (0.3,)).check()
    Cell(64, 512, 1408, 8, (422 / 1408,)).check()
    assert Cell(64, 512, 1408, 8, (422 / 1408,)).kept(422 / 1408) == 422
