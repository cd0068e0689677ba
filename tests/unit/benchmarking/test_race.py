"""The race itself: agreement with the reference, absence with a reason, and the ratios."""

import math

import pytest
import torch
from torch.nn import functional as F

from megatron_mone.benchmarking import race as race_module
from megatron_mone.benchmarking.adapters import all_adapters
from megatron_mone.benchmarking.adapters.base import Adapter, Experts
from megatron_mone.benchmarking.adapters.torch_experts import TorchLoop, WeightedSwiGLU
from megatron_mone.benchmarking.cases import Cell, make_inputs
from megatron_mone.benchmarking.checking import Checker, Results, distance, sample_of
from megatron_mone.benchmarking.race import run_cell, with_ratios
from tests.unit.benchmarking.conftest import absent_row, make_row

CPU = torch.device("cpu")
ALWAYS = {"megatron-sequential", "torch-grouped-mm", "torch-loop", "transformers-grouped-mm"}
NEED_CUDA = {"te-grouped", "scattermoe", "sonicmoe", "megablocks"}


class Doubled(TorchLoop):
    """A dense peer that is fast and wrong."""

    name = "doubled"

    def build(self, cell, inputs):
        experts = super().build(cell, inputs)
        return Experts(lambda x, p: 2 * experts.forward(x, p), experts.parameters)


class Broken(TorchLoop):
    """A peer whose own code fails when it runs."""

    name = "broken"

    def build(self, cell, inputs):
        def forward(x, probs):
            raise RuntimeError("no kernel\nfor this shape")

        return Experts(forward, [])


def _race(cell: Cell, monkeypatch=None, adapters: list[Adapter] | None = None) -> dict:
    cell.check()
    if adapters is not None:
        assert monkeypatch is not None
        monkeypatch.setattr(race_module, "all_adapters", lambda cell: adapters)
    rows = run_cell(cell, CPU, seconds=0.0, repeats=2)
    return {row.name: row for row in rows}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [23, 3])  # 3: experts without rows
def test_every_implementation_that_runs_agrees_with_the_reference(one_rank, dtype, tokens):
    rows = _race(Cell(tokens, 32, 64, 4, (0.25,), dtype, "skewed"))
    ran = {name for name, row in rows.items() if row.available}
    assert ALWAYS | {"mone-reference"} <= ran
    wide = {f"{name}-fp32" for name in ALWAYS} if dtype == "bf16" else set()
    assert wide == {name for name in ran if rows[name].in_float32 and "deepspeed" not in name}
    for name in ran:
        assert rows[name].agrees, rows[name].reason
        assert rows[name].repeats in (2, 4)  # as often again near the fastest of its kind
        assert rows[name].forward_ms > 0
    assert max(rows[name].repeats for name in ran if rows[name].dense) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="they may run")
def test_an_absent_implementation_says_why(one_rank):
    rows = _race(Cell(8, 32, 64, 4, (0.25,)))
    for name in NEED_CUDA:
        assert not rows[name].available
        assert "not installed" in rows[name].reason or "CUDA" in rows[name].reason
        assert rows[name].forward_backward_ms is None
        assert rows[name].ratio_to_best_dense is None


def test_a_cuda_peer_that_is_installed_still_needs_cuda(monkeypatch):
    from megatron_mone.benchmarking.adapters import base, cuda_peers

    monkeypatch.setattr(base, "why_no_package", lambda module, package: None)
    cell = Cell(8, 32, 64, 4, (0.25,))
    sonic = cuda_peers.SonicMoE()
    assert "CUDA" in (sonic.why_absent(cell, CPU) or "")
    assert "bf16" in (sonic.why_absent(cell, torch.device("cuda")) or "")
    assert cuda_peers.TransformerEngine().why_absent(cell, torch.device("cuda")) is None


def test_a_peer_that_disagrees_is_reported_and_is_not_the_best(monkeypatch):
    rows = _race(Cell(16, 32, 64, 4, (0.25,)), monkeypatch, [TorchLoop(), Doubled()])
    assert rows["torch-loop"].ratio_to_best_dense == 1.0
    assert not rows["doubled"].agrees
    assert rows["doubled"].error == pytest.approx(1.0, rel=1e-3)
    assert "disagrees" in rows["doubled"].reason


def test_a_peer_that_fails_is_absent_with_the_first_line(monkeypatch):
    rows = _race(Cell(16, 32, 64, 4, (0.25,)), monkeypatch, [TorchLoop(), Broken()])
    assert rows["broken"].reason == "failed: RuntimeError: no kernel"
    assert not rows["broken"].available
    assert rows["torch-loop"].available


def test_every_ratio_is_an_entry_and_blocks_are_passed_on(one_rank):
    cell = Cell(16, 32, 64, 4, (0.5, 0.25), neuron_block=4)
    names = [(a.name, a.ratio) for a in all_adapters(cell) if a.ratio is not None]
    assert ("mone-reference", 0.5) in names
    assert ("mone-reference", 0.25) in names
    rows = run_cell(cell, CPU, seconds=0.01, repeats=1)
    mone = [row for row in rows if row.name == "mone-reference"]
    assert [row.agrees for row in mone] == [True, True]


def test_ratios_are_over_the_fastest_dense_peer_that_agrees():
    rows = with_ratios([
        make_row("slow", 10.0),
        make_row("fast", 8.0, forward_ms_p10=0.9 * 5.0),
        make_row("wrong", 1.0, agrees=False),
        absent_row("absent", "not here"),
        make_row("mone-cpu", 4.0, 0.25, forward_ms=9.0),  # a median, which is not compared
    ])  # fmt: skip
    found = {row.name: row for row in rows}
    assert found["mone-cpu"].ratio_to_best_dense == 0.5
    # the fastest forward is another peer's
    assert found["mone-cpu"].ratio_to_best_dense_forward == pytest.approx(0.4)
    assert found["slow"].ratio_to_best_dense == 1.25
    assert found["wrong"].ratio_to_best_dense == 0.125
    assert found["absent"].ratio_to_best_dense is None


def test_without_a_dense_peer_there_is_no_ratio():
    rows = with_ratios([make_row("mone-cpu", 4.0, 0.25)])
    assert rows[0].ratio_to_best_dense is None


def test_the_lean_swiglu_is_the_plain_one():
    rows = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(WeightedSwiGLU.apply, (rows, probs))
    a, u = rows.chunk(2, -1)
    expected = F.silu(a) * u * probs.unsqueeze(-1)
    assert torch.allclose(WeightedSwiGLU.apply(rows, probs), expected)


def test_distance_is_relative_and_a_nan_is_no_agreement():
    assert distance(torch.tensor([3.0]), torch.tensor([2.0])) == 0.5
    assert math.isnan(distance(torch.tensor([math.nan]), torch.tensor([2.0])))


def test_rows_of_few_experts_are_compared_and_one_that_is_wrong_is_seen():
    """The results of a sample are those of the same rows among all: 20 experts of 300 rows."""
    cell = Cell(6000, 16, 32, 20, (0.25,))
    inputs = make_inputs(cell, CPU)
    rows_M, sample = sample_of(inputs)
    assert sample.counts == [128] * 8
    assert {int(row) // 300 for row in rows_M} == {0, 3, 5, 8, 11, 14, 16, 19}
    assert {0, 299, 5700, 5999} <= set(rows_M.tolist())
    peer = TorchLoop()
    x_NH, probs_N = inputs.leaves()
    y_NH = peer.build(cell, inputs).forward(x_NH, probs_N)
    dx_NH, dprobs_N = torch.autograd.grad(y_NH, [x_NH, probs_N], inputs.dy_NH)
    checker = Checker(cell, inputs)
    assert checker.judge(peer, Results(y_NH.detach(), dx_NH, dprobs_N)).agrees
    dx_NH[299] *= 1.5
    wrong = checker.judge(peer, Results(y_NH.detach(), dx_NH, dprobs_N))
    assert "disagrees with the reference" in wrong.reason


def test_who_is_near_the_fastest_of_its_kind_in_some_phase_stays():
    taken = [
        {"forward": [forward] * 3, "forward_backward": [both] * 3}
        for forward, both in (
            (1.0, 4.0),
            (1.2, 9.0),
            (2.0, 3.0),
            (2.0, 9.0),
            (9.0, 9.0),
            (8.0, 7.0),
        )
    ]
    ratios = [None, None, None, None, 0.25, 0.25]
    assert race_module._in_sight(ratios, taken) == [True, True, True, False, True, True]
