"""Which products a call takes: the rules of route.py with the processor's answer replaced."""

import pytest
import torch

from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.cpu import backend, every_neuron, gate, native, route
from tests.unit.kernels.test_cpu_backend import READY, REASON, assert_close, operands

FP32, BF16 = torch.float32, torch.bfloat16
MANY, FEW = (512, 0, 512), (8, 1, 0)


def layout(counts, neurons=1408):
    return native.Layout(counts, neurons, 512, 2)


@pytest.fixture(params=[False, True], ids=["no AMX", "AMX"])
def amx(request, monkeypatch):
    monkeypatch.setattr(route, "fast_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("counts", "share", "block", "expected"),
    [
        (MANY, 0.25, 1, "sparse"), (MANY, 0.25, 8, "sparse"), (MANY, 0.25, 16, "blocks"),
        (MANY, 0.25, 128, "blocks"), (MANY, 0.25, 352, "blocks"), (MANY, 0.25, 176, "blocks"),
        (MANY, 0.25, 88, "sparse"), (MANY, 0.25, 11, "sparse"), (MANY, 1.0, 1, "dense"),
        (MANY, 1.0, 16, "dense"), (FEW, 0.25, 352, "few"), (FEW, 0.25, 1, "few"),
        (FEW, 1.0, 16, "dense"), ((), 0.25, 1, "few"),
        ((6, 1), 1.0, 16, "few"), ((24, 8), 0.25, 1, "few"), ((32, 8), 0.25, 1, "sparse"),
        ((32, 8), 0.5, 16, "blocks"), ((32, 8), 1.0, 1, "dense"),
        ((65, 8), 0.01, 1, "sparse"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("amx")
def test_float32(counts, share, block, expected):
    kept = int(share * sum(counts) * 1408)
    assert route.route(layout(counts), kept, FP32, block) == expected


@pytest.mark.parametrize(
    ("counts", "share", "block", "without", "with_amx"),
    [
        (MANY, 0.25, 1, "sparse", "dense"), (MANY, 1.0, 1, "dense", "dense"),
        (MANY, 0.25, 16, "blocks", "dense"), (MANY, 1.0, 16, "dense", "dense"),
        (FEW, 0.25, 16, "few", "few"), (FEW, 1.0, 16, "blocks", "blocks"),
        ((60, 60), 0.25, 1, "sparse", "sparse"), ((60, 60), 1.0, 1, "sparse", "sparse"),
    ],
)  # fmt: skip
def test_bfloat16(counts, share, block, without, with_amx, amx):
    kept = int(share * sum(counts) * 1408)
    expected = with_amx if amx else without
    assert route.route(layout(counts), kept, BF16, block) == expected


def test_gate(amx):
    assert route.by_gemm(layout(MANY), FP32)
    assert not route.by_gemm(layout(FEW), FP32)
    assert route.by_gemm(layout(MANY), BF16) == amx
    assert not route.by_gemm(layout(FEW), BF16)


def test_a_torch_without_the_probe_has_no_amx(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert route.fast_bfloat16.__wrapped__() is False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert route.fast_bfloat16.__wrapped__() is True


@pytest.mark.skipif(not READY, reason=f"CPU kernels: {REASON}")
@pytest.mark.parametrize("by_gemm", [False, True], ids=["native gate", "torch gate"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_both_gates_compute_the_same(by_gemm, dtype, monkeypatch):
    """Tiles smaller than an expert and larger than several, F and H that fit no vector."""
    monkeypatch.setattr(every_neuron, "by_gemm", lambda *args: by_gemm)
    monkeypatch.setattr(gate, "TILE_ROWS", 24)
    counts = [3, 0, 60, 9, 1]
    tensors = operands(counts, 77, 141, dtype)
    assert_close(tensors, counts, Selection(30), tolerance=1e-5 if dtype == FP32 else 2e-2)


@pytest.mark.skipif(not READY, reason=f"CPU kernels: {REASON}")
def test_a_route_is_taken_forward_and_backward(monkeypatch):
    taken = []
    for name, products in list(backend.ROUTES.items()):

        class Seen(products):
            def __init__(self, *args, _name=name):
                taken.append(_name)
                super().__init__(*args)

        monkeypatch.setitem(backend.ROUTES, name, Seen)
    for counts, choose in (
        ([70], Selection(16)), ([70], Selection(16, 1, 16)), ([2], Selection(16)),
        ([70], Selection(64)),
    ):  # fmt: skip
        assert_close(operands(counts, 24, 64), counts, choose)
    assert taken == ["sparse"] * 2 + ["blocks"] * 2 + ["few"] * 2 + ["dense"] * 2
