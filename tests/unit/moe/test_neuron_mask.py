"""NeuronMask against dense bool masks: each operation has a one-line dense twin, in both forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.kernels.neuron_bits import pack_bits, unpack_bits, words_of
from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype


def of_words(dense):
    """Bit j % 32 of word j // 32, by arithmetic on whole numbers."""
    words = torch.zeros(dense.shape[0], (dense.shape[1] + 31) // 32, dtype=torch.int64)
    for row, neuron in dense.nonzero().tolist():
        words[row, neuron // 32] += 1 << neuron % 32
    return NeuronMask.of_words(words.to(torch.int32), dense.shape[1])


FORMS = {"indices": NeuronMask.from_bool, "words": of_words}
forms = st.sampled_from(list(FORMS.values()))


@st.composite
def dense_masks(draw, multiple=1, widest=70):
    rows = draw(st.integers(0, 6))
    width = multiple * draw(st.integers(1, widest))
    bits = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    return torch.tensor(bits, dtype=torch.bool).view(rows, width)


@settings(max_examples=150, deadline=None)
@given(dense_masks(), forms)
def test_round_trips(dense, form):
    mask = form(dense)
    assert torch.equal(mask.to_bool(), dense)
    assert NeuronMask.unpack(mask.pack(), dense.shape[1]) == mask
    assert mask.pack().shape == (dense.shape[0], (dense.shape[1] + 7) // 8)
    assert torch.equal(mask.pack(), pack_bits(dense))
    assert torch.equal(unpack_bits(mask.pack(), dense.shape[1]), dense)
    assert torch.equal(mask.neuron_counts(), dense.sum(dim=0))
    assert torch.equal(mask.row_lengths_N, dense.sum(dim=1))
    assert (mask.num_rows, mask.num_neurons) == dense.shape
    assert mask.num_entries == int(dense.sum())
    assert torch.equal(mask.rows_K, dense.nonzero()[:, 0])
    assert mask.density == pytest.approx(dense.float().mean().nan_to_num().item())


@settings(max_examples=100, deadline=None)
@given(dense_masks())
def test_each_form_is_made_of_the_other(dense):
    by_indices, by_words = NeuronMask.from_bool(dense), of_words(dense)
    assert by_indices == by_words
    assert by_words == by_indices
    assert torch.equal(by_words.words(), by_indices.words())
    made = NeuronMask(by_words.indices_K, by_words.offsets_N1, dense.shape[1])
    assert made == by_indices
    assert by_words.indices_K.dtype == by_indices.indices_K.dtype
    assert by_words.indices_K is by_words.indices_K
    assert by_indices.words() is by_indices.words()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 6), st.integers(1, 70), st.data())
def test_rows_that_keep_the_same_number_say_so(rows, neurons, data):
    """Number, lengths and offsets follow from S, and taking rows keeps it."""
    kept = data.draw(st.integers(0, neurons))
    order_NF = torch.rand(rows, neurons).argsort(dim=1)
    dense = torch.zeros(rows, neurons, dtype=torch.bool).scatter_(1, order_NF[:, :kept], True)
    plain = NeuronMask.from_bool(dense)
    for mask in (
        NeuronMask.from_bool(dense, kept=kept),
        NeuronMask.of_words(words_of(plain.pack()), neurons, kept=kept),
        NeuronMask.unpack(plain.pack(), neurons, kept=kept),
        NeuronMask.unchecked(plain.indices_K, plain.offsets_N1, neurons, kept=kept),
    ):
        assert mask.kept == kept
        assert mask == plain
        assert mask.known_entries == mask.num_entries == rows * kept
        assert torch.equal(mask.row_lengths_N, plain.row_lengths_N)
        assert torch.equal(mask.indices_K, plain.indices_K)
        assert torch.equal(mask.offsets_N1, plain.offsets_N1)
        assert torch.equal(mask.rows_K, plain.rows_K)
        assert torch.equal(mask.words(), plain.words())
        some = torch.arange(rows).flip(0).repeat(2)
        assert mask.rows(some) == plain.rows(some)
        assert mask.rows(some).kept == kept


@settings(max_examples=100, deadline=None)
@given(dense_masks(multiple=4, widest=40), st.sampled_from([1, 2, 4]), forms)
def test_shards_are_column_slices_and_join_again(dense, size, form):
    mask = form(dense)
    shards = [mask.shard(rank, size) for rank in range(size)]
    for shard, part in zip(shards, dense.chunk(size, dim=1), strict=True):
        assert torch.equal(shard.to_bool(), part)
    assert NeuronMask.join(shards) == mask


@settings(max_examples=100, deadline=None)
@given(st.data(), forms)
def test_rows_are_taken_in_any_order(data, form):
    dense = data.draw(dense_masks().filter(lambda d: d.shape[0] > 0))
    last = dense.shape[0] - 1
    index = torch.tensor(data.draw(st.lists(st.integers(0, last), max_size=8)), dtype=torch.long)
    assert form(dense).rows(index) == NeuronMask.from_bool(dense[index])


def test_bits_are_lowest_first():
    dense = torch.zeros(1, 10, dtype=torch.bool)
    dense[0, [0, 3, 9]] = True
    assert pack_bits(dense).tolist() == [[0b1001, 0b10]]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("other", FORMS.values(), ids=FORMS)
def test_equality_sees_rows_neurons_and_width(form, other):
    dense = torch.tensor([[True, False], [False, True]])
    mask = form(dense)
    assert mask == other(dense.clone())
    assert mask != other(dense.flip(0))
    assert mask != other(dense[:1])
    assert mask != other(torch.nn.functional.pad(dense, (0, 1)))
    assert mask != "mask"


def test_bits_stand_where_they_came():
    """Whole words are looked at where they lie; a mask of indices stays one."""
    bits = torch.randint(256, (5, 44), dtype=torch.uint8)
    mask = NeuronMask.unpack(bits, 352)
    assert mask.words().data_ptr() == mask.pack().data_ptr() == bits.data_ptr()
    shard = NeuronMask.unpack(bits[:, 4:12], 64)  # not together, so copied
    assert torch.equal(shard.words().view(torch.uint8), bits[:, 4:12])
    odd = torch.cat([bits.flatten(), bits.flatten()])[1:177].view(4, 44)  # not at a word's address
    assert torch.equal(NeuronMask.unpack(odd, 352).pack(), odd)


@pytest.mark.parametrize("neurons", [8, 24, 32, 61, 352])
def test_nobody_knows_the_bits_of_a_plan(neurons):
    """On meta: what is packed, kept and taken again has its sizes, and K."""
    mask = NeuronMask.without_values(5, neurons, 17, block=2)
    again = NeuronMask.unpack(mask.pack(), neurons, mask.block, mask.kept, mask.known_entries)
    assert mask.pack().shape == (5, (neurons + 7) // 8)
    assert again.words().shape == mask.words().shape == (5, (neurons + 31) // 32)
    assert (again.num_rows, again.num_entries, again.block) == (5, 17, 2)
    assert again.indices_K.shape == (17,)
    assert again.indices_K.dtype == mask.indices_K.dtype
    assert again.offsets_N1.shape == (6,)
    assert again.to_bool().is_meta
    even = NeuronMask.from_bool(torch.empty(5, neurons, dtype=torch.bool, device="meta"), kept=3)
    assert (even.kept, even.num_entries) == (3, 15)
    some = even.rows(torch.empty(2, dtype=torch.int64, device="meta"))
    assert (some.num_rows, some.num_entries) == (2, 6)


def test_wide_experts_use_wide_indices():
    assert index_dtype(32_767) == torch.int16
    assert index_dtype(32_768) == torch.int32


def ints(*values, dtype=torch.int16):
    return torch.tensor(values, dtype=dtype)


OFFSETS = ints(0, 2, 2, 3, dtype=torch.int64)
WORDS = torch.tensor([[1], [-(2**31)]], dtype=torch.int32)  # the sign is neuron 31
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
    (lambda: unpack_bits(torch.zeros(2, 3, dtype=torch.uint8), 8), "3 bytes a row"),
    (lambda: unpack_bits(ints(8, dtype=torch.uint8).view(1, 1), 3), "beyond its 3 neurons"),
    (lambda: NeuronMask.of_words(WORDS, 64), "masks over 64 neurons are [N, 2] torch.int32"),
    (lambda: NeuronMask.of_words(WORDS.long(), 32), "words are torch.int64 of shape (2, 1)"),
    (lambda: NeuronMask.of_words(WORDS, 31), "beyond its 31 neurons"),
    (lambda: NeuronMask.from_bool(torch.ones(1, 6) > 0).shard(0, 4), "4 ranks do not divide 6"),
    (lambda: NeuronMask.of_words(WORDS, 32).shard(0, 3), "3 ranks do not divide 32"),
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
