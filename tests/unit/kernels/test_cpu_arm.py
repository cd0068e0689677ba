"""The NEON kernels as build.py compiles them, run by an emulator behind the backend of Python."""

import os
import shutil

import pytest
import torch

from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.cpu import backend, build, native, products
from megatron_mone.kernels.cpu.shares import GateSums
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.neuron_selection import NeuronSelector
from tests.unit.kernels import cpu_kernels_elsewhere as elsewhere
from tests.unit.kernels.test_cpu_backend import (
    GATES,
    READY,
    REASON,
    SHAPE_IDS,
    SHAPES,
    assert_close,
    assert_selectors_choice,
    everything,
    operands,
    run,
    threads,  # noqa: F401
)

COMPILER, EMULATOR = map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64"))
SYSTEM = "/usr/aarch64-linux-gnu"
pytestmark = [
    pytest.mark.skipif(not READY, reason=f"CPU kernels: {REASON}"),
    pytest.mark.skipif(
        not (COMPILER and EMULATOR),
        reason="no aarch64-linux-gnu-g++ or no qemu-aarch64 on PATH: .ci/arm.sh installs them",
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The kernels in a process of the emulator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        library = build.build(folder=tmp_path_factory.mktemp("arm"))
    program = elsewhere.compile_server(COMPILER, library)
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    kernels = elsewhere.Elsewhere([EMULATOR, "-L", SYSTEM, program], environment)
    assert kernels.interface_version == native.INTERFACE_VERSION
    yield kernels
    kernels.close()


@pytest.fixture(autouse=True)
def neon(emulated, monkeypatch):
    """The backend on those kernels, its work space poisoned."""
    monkeypatch.setattr(products, "POISON", True)
    monkeypatch.setattr(native, "kernels", lambda name=None: emulated)
    monkeypatch.setattr(torch.Tensor, "data_ptr", emulated.seen(torch.Tensor.data_ptr))
    return emulated


def take(monkeypatch, name):
    """Every product on one route, the gate's by the native kernel."""
    monkeypatch.setattr(backend, "route", lambda *args: name)
    monkeypatch.setattr("megatron_mone.kernels.cpu.every_neuron.by_gemm", lambda *args: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=SHAPE_IDS[:-1])
def test_entries(shape, dtype, monkeypatch):
    counts, hidden, neurons, kept = shape
    take(monkeypatch, "sparse")
    tensors = operands(counts, hidden, neurons, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    mask = assert_close(tensors, counts, Selection(kept), tolerance=tolerance)
    if counts and dtype == torch.float32:
        gate = torch.nn.functional.silu(
            torch.cat(
                [x @ w.t() for x, w in zip(tensors[0].split(counts), tensors[2], strict=True)]
            )
        )
        expected = NeuronSelector("topk", kept, kept)(gate.detach())
        assert torch.equal(mask.to_bool(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["blocks", "few", "dense"])
@pytest.mark.parametrize(
    ("counts", "hidden", "neurons", "kept", "block"),
    [([40, 0, 3, 1], 90, 96, 32, 16), ([9], 600, 576, 192, 64), ([14, 2], 528, 256, 128, 128)],
)
def test_blocks_few_rows_and_gemms(counts, hidden, neurons, kept, block, name, dtype, monkeypatch):
    take(monkeypatch, name)
    tensors = operands(counts, hidden, neurons, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(tensors, counts, Selection(kept, 1, block), tolerance=tolerance)


@pytest.mark.parametrize("activation", backend.ACTIVATIONS)
def test_activations(activation):
    assert_close(operands([6, 0, 33], 24, 48), [6, 0, 33], Selection(12), activation)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(("kept", "groups", "block"), [(7, 1, 1), (12, 3, 1), (20, 2, 5)])
def test_selection_is_the_selectors(name, kept, groups, block):
    torch.manual_seed(1)
    assert_selectors_choice(GATES[name](), kept, groups, block)


def test_same_bits_on_any_number_of_threads(threads):  # noqa: F811
    counts = [530, 0, 33, 1]
    tensors = operands(counts, 40, 200)
    results = []
    for number in (1, 3, 8):
        threads(number)
        results.append(everything(tensors, counts))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sums_of_the_balance_loss(dtype):
    mask_NF = torch.rand(30, 50) < 0.3
    mask, block_N = NeuronMask.from_bool(mask_NF), torch.arange(30) // 10
    dense = torch.zeros(30, 50)
    gate_K = torch.randn(int(mask_NF.sum())).to(dtype)
    dense[mask_NF] = gate_K.float()
    sums, weight_BF = GateSums(mask, gate_K, block_N), torch.rand(3, 50)
    total_N, loss_N = sums.row_sums(), torch.rand(30)
    torch.testing.assert_close(total_N, dense.abs().sum(1))
    torch.testing.assert_close(sums.row_sums(weight_BF), (dense.abs() * weight_BF[block_N]).sum(1))
    share_BF, counts_BF = sums.share_sums(3, total_N)
    shares = dense.abs() / total_N.clamp(min=1e-30).unsqueeze(1)
    torch.testing.assert_close(share_BF, torch.zeros(3, 50).index_add(0, block_N, shares))
    kept = torch.zeros(3, 50, dtype=torch.int64).index_add(0, block_N, mask_NF.long())
    assert torch.equal(counts_BF, kept)
    slope = dense.sign() * (weight_BF[block_N] - loss_N.unsqueeze(1)) / total_N.unsqueeze(1)
    torch.testing.assert_close(sums.slopes(weight_BF, total_N, loss_N), slope[mask_NF])


def test_every_kernel_was_called(neon, monkeypatch):
    test_sums_of_the_balance_loss(torch.float32)
    mask = NeuronMask.from_bool(torch.rand(12, 32) < 0.5)
    for name in backend.ROUTES:
        take(monkeypatch, name)
        assert_close(operands([3, 9], 24, 32), [3, 9], Selection(16, 1, 16))
    run(operands([3, 9], 24, 32), [3, 9], lambda gate: mask.to_bool())
    assert neon.called == {name for name, _ in native._SIGNATURES}
