"""On a GPU a mask's bits go from their maker to a kernel without a word from the host.

Tensors of torch's fake CUDA device have shapes alone: whatever would wait for a value (item, bool,
nonzero, bincount, an index by truth values, a repeat of unknown size) raises there. Run by
test_neuron_mask_waits.py in a process of its own: under the emulation CUDA means the CPU.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.registry import Call
from megatron_mone.moe import recompute
from megatron_mone.moe.dispatch.stock import MaskAlltoAllTokenDispatcher
from megatron_mone.moe.recompute import RecomputeMasks

ROWS, KEPT = 6, 5
aten = torch.ops.aten


class NoCopies(TorchDispatchMode):
    """Refuses copies between devices, which fake tensors let pass, and keeps the largest size."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            assert result.device == args[func.overloadpacket is aten.copy_].device, func
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture(params=[24, 61, 64, 352])
def neurons(request):
    with FakeTensorMode(), NoCopies():
        yield request.param


def words(neurons, kept=KEPT):
    width = (neurons + 31) // 32
    made = torch.empty(ROWS, width, dtype=torch.int32, device="cuda")
    return NeuronMask.of_words(made, neurons, block=1, kept=kept)


def indices(neurons, kept=KEPT):
    made = torch.empty(ROWS * KEPT, dtype=torch.int16, device="cuda")
    offsets = torch.empty(ROWS + 1, dtype=torch.int64, device="cuda")
    return NeuronMask.unchecked(made, offsets, neurons, kept=kept)


def of_dense(neurons, kept=KEPT):
    dense = torch.empty(ROWS, neurons, dtype=torch.bool, device="cuda")
    return NeuronMask.from_bool(dense, kept=kept)


MAKERS = (words, indices, of_dense)


@pytest.fixture
def passes(monkeypatch):
    """Says which pass of a recomputed layer runs."""
    now = {"first": True}
    monkeypatch.setattr(recompute, "is_checkpointing", lambda: now["first"])
    monkeypatch.setattr(recompute, "in_recompute", lambda: not now["first"])
    return now


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kept", [KEPT, None])
def test_a_recompute_takes_the_bits_of_its_first_pass(neurons, make, kept, passes):
    masks, mask = RecomputeMasks(), make(neurons, kept)
    with torch.no_grad():
        masks.keep(mask)
    passes["first"] = False
    with NoCopies() as seen:
        taken = masks.take(ROWS, neurons)
        assert taken.words().device.type == "cuda"
    assert seen.largest < ROWS * neurons
    assert taken.words().shape == (ROWS, (neurons + 31) // 32)
    assert taken.kept == kept
    known = kept is not None or make is indices
    assert taken.known_entries == (ROWS * KEPT if known else None)


@pytest.mark.parametrize("etp", [1, 2])
def test_carried_bits_are_taken_and_returned_as_bits(neurons, etp):
    """Nothing of N F entries is made, but where a rank's neurons are no whole bytes."""
    carrier = MaskAlltoAllTokenDispatcher.__new__(MaskAlltoAllTokenDispatcher)
    carrier.config = SimpleNamespace(moe_ffn_hidden_size=etp * neurons)
    carrier.tp_rank, carrier.tp_size = etp - 1, etp
    bytes_whole = (etp * neurons + 7) // 8
    carrier._arrived_NB = torch.empty(ROWS, bytes_whole, dtype=torch.uint8, device="cuda")
    with NoCopies() as seen:
        mask = carrier.take_mask()
        assert mask.words().shape == (ROWS, (neurons + 31) // 32)
        returned = carrier._pack_whole(mask)
    assert returned.shape == (ROWS, bytes_whole)
    assert (seen.largest < ROWS * neurons) == (etp == 1 or neurons % 8 == 0)


def test_a_backend_is_chosen_without_a_count(neurons):
    weight = torch.empty(2, neurons, 8, device="cuda")
    assert Call().sized(ROWS, weight, words(neurons)).kept_share == KEPT / neurons
    assert Call().sized(ROWS, weight, words(neurons, kept=None)).kept_share is None


@pytest.mark.parametrize("make", MAKERS)
def test_bits_travel_and_are_cut(neurons, make):
    mask = make(neurons)
    arrived = NeuronMask.unpack(mask.pack(), neurons)
    some = mask.rows(torch.empty(4, dtype=torch.int64, device="cuda"))
    assert (some.words().shape[0], some.num_entries) == (4, 4 * KEPT)
    if neurons % 2 == 0:
        assert arrived.shard(1, 2).words().shape == (ROWS, (neurons // 2 + 31) // 32)
        assert mask.shard(1, 2).num_neurons == neurons // 2
    assert arrived.rows(torch.empty(4, dtype=torch.int64, device="cuda")).num_rows == 4
    for one in (mask, arrived):
        assert one.row_lengths_N.shape == (ROWS,)
        assert one.neuron_counts().shape == (neurons,)
        assert one.to_bool().shape == (ROWS, neurons)


@pytest.mark.parametrize("make", MAKERS)
def test_indices_of_rows_that_keep_the_same_number_need_no_wait(neurons, make):
    mask = make(neurons)
    assert mask.num_entries == ROWS * KEPT
    assert mask.density == KEPT / neurons
    assert mask.indices_K.shape == mask.rows_K.shape == (ROWS * KEPT,)
    assert mask.offsets_N1.shape == (ROWS + 1,)
    assert mask.indices_K.device.type == "cuda"


def test_an_unknown_number_of_entries_is_asked_for(neurons):
    """What the tests above would not see if fake tensors answered."""
    mask = words(neurons, kept=None)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        _ = mask.num_entries
