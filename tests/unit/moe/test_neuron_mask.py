"""NeuronMask against dense bool masks: every operation has a one-line dense twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype, pack_bits


@st.composite
def dense_masks(draw, multiple=1):
    rows = draw(st.integers(0, 6))
    width = multiple * draw(st.integers(1, 20))
    bits = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    return torch.tensor(bits, dtype=torch.bool).view(rows, width)


@settings(max_examples=150, deadline=None)
@given(dense_masks())
def test_round_trips(dense):
    mask = NeuronMask.from_bool(dense)
    assert torch.equal(mask.to_bool(), dense)
    assert NeuronMask.unpack(mask.pack(), dense.shape[1]) == mask
    assert mask.pack().shape == (dense.shape[0], (dense.shape[1] + 7) // 8)
    assert torch.equal(mask.neuron_counts(), dense.sum(dim=0))
    assert torch.equal(mask.row_lengths_N, dense.sum(dim=1))
    assert mask.density == pytest.approx(dense.float().mean().nan_to_num().item())


@settings(max_examples=100, deadline=None)
@given(dense_masks(multiple=4), st.sampled_from([1, 2, 4]))
def test_shards_are_column_slices_and_join_again(dense, size):
    mask = NeuronMask.from_bool(dense)
    shards = [mask.shard(rank, size) for rank in range(size)]
    for shard, part in zip(shards, dense.chunk(size, dim=1), strict=True):
        assert torch.equal(shard.to_bool(), part)
    assert NeuronMask.join(shards) == mask


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_are_taken_in_any_order(data):
    dense = data.draw(dense_masks().filter(lambda d: d.shape[0] > 0))
    last = dense.shape[0] - 1
    index = torch.tensor(data.draw(st.lists(st.integers(0, last), max_size=8)), dtype=torch.long)
    assert NeuronMask.from_bool(dense).rows(index) == NeuronMask.from_bool(dense[index])


def test_bits_are_lowest_first():
    dense = torch.zeros(1, 10, dtype=torch.bool)
    dense[0, [0, 3, 9]] = True
    assert pack_bits(dense).tolist() == [[0b1001, 0b10]]


def test_equality_sees_rows_neurons_and_width():
    dense = torch.tensor([[True, False], [False, True]])
    mask = NeuronMask.from_bool(dense)
    assert mask == NeuronMask.from_bool(dense.clone())
    assert mask != NeuronMask.from_bool(dense.flip(0))
    assert mask != NeuronMask.from_bool(torch.nn.functional.pad(dense, (0, 1)))
    assert mask != "mask"


def test_wide_experts_use_wide_indices():
    assert index_dtype(32_767) == torch.int16
    assert index_dtype(32_768) == torch.int32


def ints(*values, dtype=torch.int16):
    return torch.tensor(values, dtype=dtype)


OFFSETS = ints(0, 2, 2, 3, dtype=torch.int64)
WRONG = [
    (lambda: NeuronMask(ints(1, 0, 2), OFFSETS, 4), "row 0 is not strictly ascending"),
    (lambda: NeuronMask(ints(1, 1, 2), OFFSETS, 4), "row 0 is not strictly ascending"),
    (
        lambda: NeuronMask(ints(0, 3, 2), ints(0, 1, 3, dtype=torch.int64), 4),
        "row 1 is not strictly ascending",
    ),
    (lambda: NeuronMask(ints(0, 4, 2), OFFSETS, 4), "indices run from 0 to 4"),
    (lambda: NeuronMask(ints(-1, 1, 2), OFFSETS, 4), "indices run from -1 to 2"),
    (lambda: NeuronMask(ints(0, 1), OFFSETS, 4), "offsets must rise from 0 to the 2 indices"),
    (
        lambda: NeuronMask(ints(0, 1), ints(0, 2, 1, 2, dtype=torch.int64), 4),
        "offsets must rise",
    ),
    (lambda: NeuronMask(ints(0, 1, dtype=torch.int64), OFFSETS, 4), "indices are torch.int64"),
    (lambda: NeuronMask(ints(0), ints(0, 1), 4), "offsets are torch.int16"),
    (lambda: NeuronMask.unpack(torch.zeros(2, 3, dtype=torch.uint8), 8), "3 bytes a row"),
    (lambda: NeuronMask.unpack(ints(8, dtype=torch.uint8).view(1, 1), 3), "beyond its 3 neurons"),
    (lambda: NeuronMask.from_bool(torch.ones(1, 6) > 0).shard(0, 4), "4 ranks do not divide 6"),
]


@pytest.mark.parametrize(("make", "part"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_refused_on_construction(make, part):
    with pytest.raises(ValueError) as caught:
        make()
    assert part in str(caught.value)


def test_valid_edges_are_accepted():
    """Rows may fall at a boundary (the next row starts lower) and may be empty."""
    mask = NeuronMask(ints(2, 3, 0), OFFSETS, 4)
    assert mask.row_lengths_N.tolist() == [2, 0, 1]
    assert NeuronMask(ints(), ints(0, 0, dtype=torch.int64), 4).num_rows == 1
