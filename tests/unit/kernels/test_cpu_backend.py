"""The native CPU backend against the reference and float64, over shapes, masks and threads."""

import threading

import pytest
import torch

from megatron_mone.benchmarking.memory import measure_peaks
from megatron_mone.kernels import grouped_mlp_with_gates
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.cpu import backend, native, products
from megatron_mone.kernels.cpu.backend import masked_grouped_mlp
from megatron_mone.kernels.cpu.gate import TILE_ROWS, select_rows
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.neuron_selection import NeuronSelector

OPERANDS = ("x", "probs", "w_gate", "w_up", "w_down")
READY, REASON = backend.available()
pytestmark = pytest.mark.skipif(not READY, reason=f"CPU kernels: {REASON}")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs and work space start as NaN, so that an element nobody wrote is seen."""
    monkeypatch.setattr(products, "POISON", True)


@pytest.fixture(params=native.INSTRUCTION_SETS)
def every_set(request, monkeypatch):
    """Each instruction set that this processor runs."""
    try:
        table = native.kernels(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(native, "kernels", lambda name=None: table)


def operands(counts, hidden, neurons, dtype=torch.float32, seed=0):
    """[x, probs, w_gate, w_up, w_down] with requires_grad."""
    torch.manual_seed(seed)
    rows, shape = sum(counts), (len(counts), neurons, hidden)
    tensors = [torch.randn(rows, hidden).to(dtype), torch.rand(rows)]
    tensors += [(torch.randn(shape) * hidden**-0.5).to(dtype) for _ in range(3)]
    return [t.requires_grad_() for t in tensors]


def run(tensors, counts, choose, activation="silu"):
    x, probs, *weights = tensors
    return masked_grouped_mlp(x, probs, counts, *weights, choose=choose, activation=activation)[:3]


def wide(tensors, counts, mask_NF, activation="silu"):
    """(y, gate_K) by plain autograd in float64."""
    x, probs, *weights = [t.double() for t in tensors]
    outs, gates = [x[:0]], [probs[:0]]
    cut = [t.split(counts) for t in (x, probs, mask_NF)] if counts else [()] * 3
    for rows, p, mask, gate_w, up_w, down_w in zip(*cut, *weights, strict=True):
        gate = gate_activation(activation, rows @ gate_w.t())
        h = (p.unsqueeze(1) * gate * (rows @ up_w.t())).masked_fill(~mask, 0.0)
        outs.append(h @ down_w)
        gates.append(gate[mask])
    return torch.cat(outs), torch.cat(gates)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def assert_close(tensors, counts, choose, activation="silu", tolerance=1e-5):
    """Outputs and all gradients, the gate's own included, against float64 on the same mask."""
    y, mask, gate = run(tensors, counts, choose, activation)
    wide_tensors = [t.detach().double().requires_grad_() for t in tensors]
    y_wide, gate_wide = wide(wide_tensors, counts, mask.to_bool(), activation)
    dy, dgate = torch.randn_like(y), torch.randn_like(gate)
    grads = torch.autograd.grad([y, gate], tensors, [dy, dgate])
    grads_wide = torch.autograd.grad(
        [y_wide, gate_wide], wide_tensors, [dy.double(), dgate.double()], materialize_grads=True
    )
    assert relative(y, y_wide) <= tolerance
    assert relative(gate, gate_wide) <= tolerance
    for name, ours, theirs in zip(OPERANDS, grads, grads_wide, strict=True):
        assert ours.isfinite().all(), name
        assert relative(ours, theirs) <= tolerance, name
    return mask


SHAPES = [  # counts, H, F, S
    ([3, 0, 9], 40, 70, 20),
    ([1], 130, 33, 1),
    ([5, 7], 64, 96, 95),
    ([0, 0], 16, 24, 6),
    ([], 16, 24, 6),
    ([700, 20], 72, 200, 50),
    ([17, 64, 97], 257, 333, 40),
    ([1, 1, 1, 1], 512, 1408, 352),
]
SHAPE_IDS = ["empty-expert", "one-token", "S=F-1", "N=0", "E=0", "tiles", "odd", "decode"]


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("name", [None, "sparse"], ids=["own route", "sparse"])
def test_gradients_and_reference_mask(shape, name, every_set, monkeypatch):
    counts, hidden, neurons, kept = shape
    if name is not None:
        monkeypatch.setattr(backend, "route", lambda *args: name)
    tensors = operands(counts, hidden, neurons)
    mask = assert_close(tensors, counts, Selection(kept))
    if not counts:
        return
    select = NeuronSelector("topk", kept, kept)
    x, probs, *weights = tensors
    expected = grouped_mlp_with_gates(
        x, probs, counts, *weights, choose=select, backend="reference"
    )
    assert torch.equal(mask.to_bool(), expected.mask.to_bool())
    y, _, gate = run(tensors, counts, Selection(kept))
    assert relative(y, expected.y_NH) <= 1e-5
    assert relative(gate, expected.gate_K) <= 1e-5


@pytest.mark.parametrize("hidden", [1040, 1028], ids=["whole lines", "parts of lines"])
def test_gradients_too_large_for_the_caches(hidden, every_set, monkeypatch):
    monkeypatch.setattr(backend, "route", lambda *a: "sparse")
    tensors = operands([70, 2], hidden, 1024)  # kPastCaches of simd.h: 2^21 floats
    assert_close(tensors, [70, 2], Selection(64))


@pytest.mark.parametrize("activation", backend.ACTIVATIONS)
@pytest.mark.parametrize("kept", [12, 40, 48], ids=["sparse", "dense-route", "keep-all"])
def test_activations_and_routes(activation, kept):
    counts = [6, 0, 33]
    assert_close(operands(counts, 24, 48), counts, Selection(kept), activation)


def test_keep_all_is_the_reference():
    counts = [4, 9]
    tensors = operands(counts, 24, 16)
    x, probs, *weights = tensors
    keep = lambda gate: torch.ones_like(gate, dtype=torch.bool)  # noqa: E731
    expected = grouped_mlp_with_gates(x, probs, counts, *weights, choose=keep, backend="reference")
    y, mask, _ = run(tensors, counts, Selection(16))
    assert mask.to_bool().all()
    assert mask == expected.mask
    assert relative(y, expected.y_NH) <= 1e-6


@pytest.mark.parametrize("kept", [8, 30])
def test_bfloat16(kept):
    counts = [40, 3]
    tensors = operands(counts, 96, 32, torch.bfloat16)
    assert_close(tensors, counts, Selection(kept), tolerance=2e-2)
    x, probs, *weights = tensors
    select = NeuronSelector("topk", kept, kept)
    expected = grouped_mlp_with_gates(
        x, probs, counts, *weights, choose=select, backend="reference"
    )
    y, _, gate = run(tensors, counts, Selection(kept))
    assert y.dtype == gate.dtype == torch.bfloat16
    assert relative(y, expected.y_NH) <= 2e-2


def test_weight_gradients_sum_in_float32():
    """2,000 rows of bf16: a bf16 accumulator would stop growing near 256 equal terms."""
    x = torch.ones(2000, 32, dtype=torch.bfloat16)
    weights = [torch.full((1, 8, 32), 0.03125, dtype=torch.bfloat16) for _ in range(3)]
    weights[2].requires_grad_()
    y, _, _ = run([x, torch.ones(2000), *weights], [2000], Selection(2))
    (dw,) = torch.autograd.grad(y, weights[2], torch.ones_like(y))
    h = torch.nn.functional.silu(torch.ones(()))
    assert torch.allclose(dw[0, :2].float(), 2000 * h, rtol=5e-3)


GATES = {
    "random": lambda: torch.randn(40, 60),
    "ties": lambda: torch.randint(-3, 4, (40, 60)).float(),
    "zeros": lambda: torch.zeros(40, 60),
    "signed zeros": lambda: torch.zeros(40, 60) * torch.randn(40, 60).sign(),
    "nan": lambda: torch.where(torch.rand(40, 60) < 0.1, torch.nan, torch.randn(40, 60)),
    "nan and inf": lambda: torch.where(torch.rand(40, 60) < 0.5, -torch.nan, torch.inf),
    "tiny": lambda: torch.randn(40, 60) * 1e-42,
    "scales": lambda: torch.randn(40, 60) * 10.0 ** torch.randint(-30, 30, (40, 1)),
    "order": lambda: torch.where(torch.rand(40, 60) < 0.15, 2.0**24, 1.0),  # sums depend on it
}


def assert_selectors_choice(gate, kept, groups=1, block=1):
    """select_rows chooses of a gate [40, F] what NeuronSelector does, with either type of index."""
    select = NeuronSelector("topk", kept, kept, groups=groups, block=block)
    expected = NeuronMask.from_bool(select(gate))
    for dtype in (torch.int16, torch.int32):
        chosen = torch.full((40 * kept,), -1, dtype=dtype)
        select_rows(gate, Selection(kept, groups, block), chosen)
        assert torch.equal(chosen, expected.indices_K.to(dtype))


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(("kept", "groups"), [(1, 1), (7, 1), (59, 1), (60, 1), (12, 3), (20, 20)])
def test_selection_is_the_selectors(name, kept, groups, every_set):
    torch.manual_seed(1)
    assert_selectors_choice(GATES[name](), kept, groups)


def test_wide_rows_use_int32_indices():
    tensors = operands([3], 4, 40_000)
    mask = assert_close(tensors, [3], Selection(100))
    assert mask.indices_K.dtype == torch.int32


def test_nan_gate_is_kept_and_surfaces():
    tensors = [t.detach() for t in operands([4], 16, 32)]
    tensors[0][1] = torch.nan
    y, mask, _ = run(tensors, [4], Selection(5))
    assert mask.to_bool()[1, :5].all()
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


def test_masks_and_rules_can_be_given():
    counts = [9, 30]
    tensors = operands(counts, 48, 64)
    ragged = torch.rand(39, 64) < torch.rand(39, 1) * 0.5
    ragged[3] = False
    for choose in (NeuronMask.from_bool(ragged), lambda gate: ragged):
        assert torch.equal(assert_close(tensors, counts, choose).to_bool(), ragged)
    seen = []
    run(tensors, counts, lambda gate: seen.append(gate) or ragged)
    (gate,) = seen
    assert gate.shape == (39, 64)
    assert not gate.requires_grad


def test_returned_mask_is_valid():
    _, mask, _ = run(operands([9, 30], 48, 64), [9, 30], Selection(16, 4))
    assert mask == NeuronMask(mask.indices_K, mask.offsets_N1, 64)


@pytest.mark.parametrize("kept", [32, 100], ids=["sparse", "dense"])
def test_non_contiguous_inputs(kept):
    counts = [8, 50]
    x, probs, gate, up, down = [t.detach() for t in operands(counts, 96, 128)]
    fused = torch.stack((gate, up), dim=1)
    views = [x.t().contiguous().t(), torch.stack((probs, probs), 1)[:, 0], fused[:, 0], fused[:, 1]]
    views.append(down.transpose(1, 2).contiguous().transpose(1, 2))
    plain = [t.clone().requires_grad_() for t in (x, probs, gate, up, down)]
    strided = [t.requires_grad_() for t in views]
    outs = []
    for tensors in (plain, strided):
        y, _, _ = run(tensors, counts, Selection(kept))
        outs.append([y, *torch.autograd.grad(y, tensors, torch.ones(1, 1).expand(58, 96))])
    for a, b in zip(*outs, strict=True):
        assert relative(a, b) <= 1e-6


def everything(tensors, counts):
    """Outputs and gradients on a given mask, so that torch's GEMM has no part in them."""
    torch.manual_seed(3)
    mask = NeuronMask.from_bool(torch.rand(sum(counts), 200) < 0.25)
    y, _, gate = run(tensors, counts, mask)
    grads = torch.autograd.grad([y, gate], tensors, [torch.randn_like(y), torch.ones_like(gate)])
    return [y, gate, *grads]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_same_bits_on_any_number_of_threads(threads):
    counts = [600, 0, 33, 1]
    tensors = operands(counts, 200, 200)
    results = []
    for number in (1, 2, 3, 8):
        threads(number)
        results.append(everything(tensors, counts))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_choice_on_any_number_of_threads(dtype, threads, monkeypatch):
    """The gate by the native product."""
    monkeypatch.setattr("megatron_mone.kernels.cpu.every_neuron.by_gemm", lambda *args: False)
    tensors = operands([130, 0, 33], 90, 300, dtype)
    results = []
    for number in (1, 2, 3, 8):
        threads(number)
        y, mask, gate = run(tensors, [130, 0, 33], Selection(75))
        results.append([y, mask.indices_K, gate])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_python_threads_at_once():
    counts = [40, 90]
    inputs = [operands(counts, 64, 200, seed=seed) for seed in (1, 2)]
    torch.manual_seed(3)
    mask = NeuronMask.from_bool(torch.rand(130, 200) < 0.25)
    dy = torch.randn(130, 64)

    def gradients(tensors):
        return torch.autograd.grad(run(tensors, counts, mask)[0], tensors, dy)

    expected = [gradients(tensors) for tensors in inputs]
    wrong = []

    def work(i):
        for _ in range(8):
            grads = gradients(inputs[i])
            if not all(torch.equal(a, b) for a, b in zip(grads, expected[i], strict=True)):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 0.34), (torch.bfloat16, 0.40)], ids=["fp32", "bf16"]
)
def test_saved_bytes(dtype, limit):
    """Beside x, p and the weights, against a dense expert's a and u."""
    counts, neurons = [64, 64], 256
    tensors = operands(counts, 64, neurons, dtype)
    known, saved = {t.data_ptr() for t in tensors}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(tensors, counts, Selection(neurons // 4))
    dense = 2 * 128 * neurons * dtype.itemsize
    assert 0 < sum(saved.values()) <= limit * dense


def test_frozen_operands_get_no_gradient():
    tensors = operands([20], 32, 64)
    for i in (0, 3):
        tensors[i] = tensors[i].detach()
    y, _, _ = run(tensors, [20], Selection(16))
    y.sum().backward()
    assert tensors[0].grad is None
    assert tensors[3].grad is None
    assert all(tensors[i].grad.isfinite().all() for i in (1, 2, 4))


@pytest.mark.parametrize("name", ["blocks", "few", "sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_go_into_sinks(name, dtype, sink_dtype, every_set, monkeypatch):
    """Two backward passes add to what strided sinks hold; the weights get no gradient."""
    counts, choose = [40, 0, 3, 1], Selection(32, 1, 16)
    monkeypatch.setattr(backend, "route", lambda *args: name)
    tensors = operands(counts, 90, 96, dtype)
    shape = tensors[2].shape
    held = [torch.randn(4, 2, 96, 90).to(sink_dtype)[:, i % 2] for i in range(3)]
    sinks = [t.clone(memory_format=torch.preserve_format) for t in held]
    y, _, _ = run(tensors, counts, choose)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, tensors, dy)
    for weight, sink in zip(tensors[2:], sinks, strict=True):
        assert sink.shape == shape
        weight.grad_sink = lambda sink=sink: sink
    for _ in range(2):
        y, _, _ = run(tensors, counts, choose)
        grads = torch.autograd.grad(y, tensors, dy, allow_unused=True)
        assert torch.equal(grads[0], expected[0])
        assert all(g is None for g in grads[2:])
    tolerance = 1e-6 if dtype == sink_dtype == torch.float32 else 1e-2
    for before, sink, gradient in zip(held, sinks, expected[2:], strict=True):
        assert relative(sink, before.double() + 2 * gradient.double()) <= tolerance


def test_a_graph_can_be_run_again():
    """What backward gives back early stays where the graph is retained."""
    tensors = operands([20], 32, 64)
    y, _, _ = run(tensors, [20], Selection(16))
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    again = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_peak_memory():
    """Beside y, dx and the weight gradients less than two float32 arrays over kept entries."""
    counts, hidden, neurons = [256] * 8, 128, 512
    tensors = operands(counts, hidden, neurons)
    dy = torch.randn(sum(counts), hidden)
    products.release_scratch()
    peaks = measure_peaks(
        lambda: run(tensors, counts, Selection(neurons // 4))[0],
        lambda y: torch.autograd.grad(y, tensors, dy),
    )
    kept = sum(counts) * neurons // 4
    results = 4 * (2 * sum(counts) * hidden + 3 * 8 * neurons * hidden)
    assert peaks.total <= results + 2.5 * 4 * kept + 4 * TILE_ROWS * neurons


def test_offsets_are_64_bits():
    """Row 2^20 of 4,096 floats begins at element 2^32."""
    assert native.element(1 << 20, 4096, 7) == (1 << 32) + 7
