"""The native kernels of masks of whole blocks, and the choice of blocks, on every route."""

import pytest
import torch

from megatron_mone.kernels import grouped_mlp_with_gates
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.cpu import backend, native
from megatron_mone.kernels.cpu.block_products import BlockProducts
from megatron_mone.kernels.cpu.gate import select_rows
from megatron_mone.kernels.neuron_mask import NeuronMask
from tests.unit.kernels.test_cpu_backend import (
    GATES,
    READY,
    REASON,
    assert_close,
    assert_selectors_choice,
    every_set,  # noqa: F401
    operands,
    poisoned,  # noqa: F401
    relative,
    run,
    threads,  # noqa: F401
)

pytestmark = pytest.mark.skipif(not READY, reason=f"CPU kernels: {REASON}")

SHAPES = [  # counts, H, F, S, B, groups
    ([13, 0, 9], 40, 96, 32, 16, 1),
    ([1], 130, 64, 16, 16, 1),
    ([1, 1, 1], 64, 512, 128, 128, 1),
    ([25, 7], 64, 96, 96, 16, 1),
    ([0, 0], 16, 32, 16, 16, 1),
    ([], 16, 32, 16, 16, 1),
    ([700, 20], 72, 192, 64, 32, 2),
    ([17, 64, 97], 257, 1536, 512, 128, 2),
    ([530], 600, 1040, 160, 16, 5),
    ([12, 40], 600, 320, 160, 16, 5),
    ([7, 30], 40, 288, 144, 48, 3),
    ([3, 20], 24, 1408, 352, 352, 1),
]
SHAPE_IDS = ["empty-expert", "one-row", "decode", "S=F", "N=0", "E=0", "tiles", "odd", "chunks"]
SHAPE_IDS += ["ranges", "B=48", "B=S=352"]


def take(monkeypatch, name, counts):
    """Every product on one route."""
    if name == "few" and max(counts, default=0) > native.FEW_ROWS:
        pytest.skip("too many rows")
    monkeypatch.setattr(backend, "route", lambda *args: name)


@pytest.mark.parametrize("name", ["blocks", "few", "sparse", "dense"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.usefixtures("every_set")
def test_gradients_and_reference_mask(shape, name, monkeypatch):
    counts, hidden, neurons, kept, block, groups = shape
    take(monkeypatch, name, counts)
    tensors = operands(counts, hidden, neurons)
    choose = Selection(kept, groups, block)
    mask = assert_close(tensors, counts, choose)
    assert mask.block == block
    if not counts:
        return
    x, probs, *weights = tensors
    expected = grouped_mlp_with_gates(
        x, probs, counts, *weights, choose=choose, backend="reference"
    )
    assert mask == expected.mask
    y, _, gate = run(tensors, counts, choose)
    assert relative(y, expected.y_NH) <= 1e-5
    assert relative(gate, expected.gate_K) <= 1e-5


@pytest.mark.parametrize("activation", backend.ACTIVATIONS)
def test_activations(activation):
    counts = [16, 0, 33]
    assert_close(operands(counts, 24, 64), counts, Selection(32, 1, 16), activation)


@pytest.mark.parametrize("name", ["blocks", "few", "sparse", "dense"])
def test_bfloat16(name, monkeypatch):
    counts, choose = [40, 3, 64 if name == "few" else 600], Selection(32, 1, 16)
    take(monkeypatch, name, counts)
    tensors = operands(counts, 90, 96, torch.bfloat16)
    assert_close(tensors, counts, choose, tolerance=2e-2)
    y, mask, gate = run(tensors, counts, choose)
    assert y.dtype == gate.dtype == torch.bfloat16
    assert mask.block == 16


def ragged_blocks(rows, neurons, block):
    """[rows, neurons] bool of whole blocks; rows keep different numbers, one of them none."""
    mask = torch.rand(rows, neurons // block) < torch.rand(rows, 1)
    mask[rows // 2] = False
    return mask.repeat_interleave(block, dim=1)


@pytest.mark.parametrize("neurons", [320, 33_024], ids=["int16", "int32"])
@pytest.mark.parametrize("block", [16, 64])
def test_ready_masks_of_blocks(neurons, block, monkeypatch):
    taken = []

    class Seen(BlockProducts):
        def __init__(self, *args):
            taken.append(1)
            super().__init__(*args)

    monkeypatch.setitem(backend.ROUTES, "blocks", Seen)
    counts = [30, 12]
    mask_NF = ragged_blocks(42, neurons, block)
    tensors = operands(counts, 24, neurons)
    chosen = assert_close(tensors, counts, NeuronMask.from_bool(mask_NF, block))
    assert torch.equal(chosen.to_bool(), mask_NF)
    assert len(taken) == 2


@pytest.mark.parametrize(
    ("neurons", "kept", "groups", "block"),
    [(88, 22, 1, 11), (88, 44, 2, 22), (88, 22, 1, 22), (96, 24, 1, 24), (24, 6, 1, 3)],
)
@pytest.mark.parametrize(("name", "most"), [("few", 12), ("sparse", 70)])
@pytest.mark.usefixtures("every_set")
def test_blocks_that_are_no_multiple_of_16_are_computed_entry_by_entry(
    neurons, kept, groups, block, name, most, monkeypatch
):
    """Chosen, and given as recompute does; no other route than the named one is there."""
    monkeypatch.setattr(backend, "ROUTES", {name: backend.ROUTES[name]})
    counts, choose = [most, 0, 9], Selection(kept, groups, block)
    tensors = operands(counts, 40, neurons)
    mask = assert_close(tensors, counts, choose)
    assert mask.block == block
    x, probs, *weights = tensors
    expected = grouped_mlp_with_gates(
        x, probs, counts, *weights, choose=choose, backend="reference"
    )
    assert mask == expected.mask
    assert_close(tensors, counts, mask)


def test_a_mask_that_only_looks_like_blocks_is_computed_entry_by_entry(monkeypatch):
    """Rows keep a multiple of 16 neurons, but not aligned ones: the mask does not say blocks."""
    monkeypatch.setitem(backend.ROUTES, "blocks", None)
    mask_NF = torch.zeros(20, 64, dtype=torch.bool)
    mask_NF[:, 8:24] = True
    assert_close(operands([20], 24, 64), [20], NeuronMask.from_bool(mask_NF))


def everything(tensors, counts, neurons):
    """Outputs and gradients without torch's GEMM, and without its silu: where its threads split an
    array, the elements left over are computed by other code."""
    torch.manual_seed(3)
    mask = NeuronMask.from_bool(ragged_blocks(sum(counts), neurons, 16), 16)
    y, _, gate = run(tensors, counts, mask, "relu")
    grads = torch.autograd.grad([y, gate], tensors, [torch.randn_like(y), torch.ones_like(gate)])
    return [y, gate, *grads]


@pytest.mark.parametrize("name", ["blocks", "few"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_on_any_number_of_threads(name, dtype, threads, monkeypatch):  # noqa: F811
    counts, neurons = [60 if name == "few" else 600, 0, 33, 1], 1040
    take(monkeypatch, name, counts)
    tensors = operands(counts, 200, neurons, dtype)
    results = []
    for number in (1, 2, 3, 8):
        threads(number)
        results.append(everything(tensors, counts, neurons))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    """Groups of rows share loads; each row's sums are added in its own order."""
    counts, neurons = [64], 320
    torch.manual_seed(5)
    mask_NF = ragged_blocks(64, neurons, 16)
    x, probs, *weights = [t.detach() for t in operands(counts, 96, neurons)]
    full, _, _ = run([x, probs, *weights], counts, NeuronMask.from_bool(mask_NF, 16))
    part, _, _ = run(
        [x[7:40], probs[7:40], *weights], [33], NeuronMask.from_bool(mask_NF[7:40], 16)
    )
    assert torch.equal(full[7:40], part)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(
    ("neurons", "kept", "groups", "block"),
    [
        *((192, 2, 1, 2), (192, 16, 1, 4), (192, 48, 3, 8), (192, 64, 2, 32), (192, 192, 1, 64)),
        *((192, 6, 1, 3), (192, 24, 2, 6), (176, 44, 1, 11), (176, 88, 2, 22), (231, 66, 1, 33)),
        *((192, 96, 2, 48), (176, 88, 1, 88)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.usefixtures("every_set")
def test_block_selection_is_the_selectors(name, neurons, kept, groups, block, dtype):
    torch.manual_seed(1)
    gate = torch.cat([GATES[name]() for _ in range(4)], dim=1)[:, :neurons].to(dtype)
    assert_selectors_choice(gate, kept, groups, block)


def test_block_scores_are_added_as_halves():
    """1 is lost when it is added to 2^24 alone, not when both ones are added first."""
    gate = torch.tensor([[2.0**24, 1.0, 0.0, 1.0, 2.0**24, 1.0, 1.0, 0.0]])
    # halves: (2^24 + 0) + (1 + 1) is above (2^24 + 1) + (1 + 0); neighbours: the other way round
    chosen = torch.zeros(4, dtype=torch.int16)
    select_rows(gate, Selection(4, 1, 4), chosen)
    assert chosen.tolist() == [0, 1, 2, 3]
    select_rows(gate.roll(4, dims=1), Selection(4, 1, 4), chosen)
    assert chosen.tolist() == [4, 5, 6, 7]
    # three: (2^24 + 1) + 1 is below (1 + 1) + 2^24; from left to right they would tie
    gate = torch.tensor([[2.0**24, 1.0, 1.0, 1.0, 2.0**24, 1.0]])
    select_rows(gate, Selection(3, 1, 3), chosen)
    assert chosen.tolist()[:3] == [3, 4, 5]


def test_offsets_are_64_bits():
    """Entry 2^28 of a list, 16 neurons each, and row 2^20 of 4,096 floats begin at 2^32."""
    assert native.element(1 << 28, native.BLOCK, 0) == 1 << 32
    assert native.element(1 << 20, 4096, 7) == (1 << 32) + 7
