"""Selection against a plain Python sort: exact, ties to the lower index, NaN on top."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.kernels.neuron_selection import NeuronSelector, block_scores, top_neurons

# few distinct values, so that ties are the rule; each is exact in float32
VALUES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -2.0, 3.0, 2.0**-100, float("inf")])


def sorted_choice(scores: list[float], kept: int) -> set[int]:
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return set(order[:kept])


def rank(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_topk_is_exact_with_ties_to_the_lower_index(data):
    groups = data.draw(st.integers(1, 3))
    width = data.draw(st.integers(1, 6))
    kept = data.draw(st.integers(1, width))
    row = data.draw(st.lists(VALUES | st.just(math.nan), min_size=groups * width,
                             max_size=groups * width))  # fmt: skip
    select = NeuronSelector("topk", kept * groups, kept * groups, groups=groups)
    mask = select(torch.tensor([row, row[::-1]]))
    for values, chosen in zip((row, row[::-1]), mask, strict=True):
        wanted = set()
        for g in range(groups):
            part = [rank(v) for v in values[g * width : (g + 1) * width]]
            wanted |= {g * width + j for j in sorted_choice(part, kept)}
        assert set(chosen.nonzero().flatten().tolist()) == wanted


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_threshold_keeps_the_large_within_bounds(data):
    width = data.draw(st.integers(1, 8))
    low = data.draw(st.integers(1, width))
    high = data.draw(st.integers(low, width))
    tau = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    row = data.draw(st.lists(VALUES, min_size=width, max_size=width))
    select = NeuronSelector("threshold", low, high, threshold=tau)
    kept = set(select(torch.tensor([row]))[0].nonzero().flatten().tolist())
    scores = [rank(v) for v in row]
    floor = float(torch.tensor(max(scores)) * tau)
    passing = {j for j in range(width) if scores[j] >= floor} & sorted_choice(scores, high)
    assert kept == passing | sorted_choice(scores, low)
    assert low <= len(kept) <= high


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_blocks_are_chosen_by_their_sums(data):
    """Both rules on the sums of blocks, by group; a NaN puts its block on top."""
    rule = data.draw(st.sampled_from(["topk", "threshold"]))
    block = data.draw(st.sampled_from([1, 2, 3, 4, 5, 11]))
    groups, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    low = data.draw(st.integers(1, width))
    high = low if rule == "topk" else data.draw(st.integers(low, width))
    size = groups * block
    row = data.draw(st.lists(VALUES | st.just(math.nan), min_size=width * size,
                             max_size=width * size))  # fmt: skip
    select = NeuronSelector(
        rule, low * size, high * size, threshold=0.5, groups=groups, block=block
    )
    sums = [rank(sum(abs(v) for v in row[b : b + block])) for b in range(0, len(row), block)]
    wanted = set()
    for start in range(0, len(sums), width):
        part = sums[start : start + width]
        chosen = sorted_choice(part, high)
        if rule == "threshold":
            passing = {b for b in chosen if part[b] >= 0.5 * max(part)}
            chosen = passing | sorted_choice(part, low)
        wanted |= {start + b for b in chosen}
    mask = select(torch.tensor([row]))[0]
    assert set(mask.nonzero().flatten().tolist()) == {
        b * block + i for b in wanted for i in range(block)
    }


def test_the_order_of_a_blocks_sum_is_fixed():
    """Halves are added in float32, as every backend does: 2^24 + 1 is 2^24 there, 1 + 1 is 2."""
    big = float(1 << 24)
    row = torch.tensor([[big, 1.0, 1.0, 1.0]])
    # (big + 1) + (1 + 1); from left to right it would be big
    assert block_scores(row, 4).item() == big + 2
    assert block_scores(row.bfloat16(), 4).dtype == torch.float32
    # three are four with a zero: (big + 1) + (1 + 0) is big, and (1 + 1) + (big + 0) is big + 2
    three = torch.tensor([[big, 1.0, 1.0, 1.0, big, 1.0]])
    assert block_scores(three, 3).tolist() == [[big, big + 2]]


def added_as_defined(values: list[numpy.float32]) -> numpy.float32:
    """Zeros up to a power of two, then each of the first half to its like in the second."""
    size = 1
    while size < len(values):
        size *= 2
    values = values + [numpy.float32(0)] * (size - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [values[i] + values[half + i] for i in range(half)]
    return values[0]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 6, 7, 8, 11, 12, 22, 24, 31, 33, 48, 88, 352])
def test_a_block_of_any_size_is_added_as_defined(block):
    """Bit for bit, as a plain loop over float32 numbers adds."""
    score = torch.rand(3, 4 * block) * 10.0 ** torch.randint(-3, 4, (3, 4 * block))
    wanted = [
        [added_as_defined(list(row[b : b + block])) for b in range(0, 4 * block, block)]
        for row in score.numpy()
    ]
    assert torch.equal(block_scores(score, block), torch.tensor(numpy.array(wanted)))


def test_bias_moves_the_choice_only():
    select = NeuronSelector("topk", 1, 1)
    gate = torch.tensor([[1.0, 2.0]])
    assert select(gate)[0].tolist() == [False, True]
    assert select(gate, torch.tensor([[1.5, 0.0]]))[0].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_repeatable(dtype):
    score = torch.randn(64, 96).abs().to(dtype)
    first = top_neurons(score, 24)
    assert torch.equal(first, top_neurons(score, 24))
    assert (first.sum(dim=1) == 24).all()
    order = score.float().sort(dim=1, descending=True, stable=True).indices[:, :24]
    assert torch.equal(first, torch.zeros_like(first).scatter_(1, order, True))


def test_no_rows_and_all_neurons():
    assert top_neurons(torch.empty(0, 8), 2).shape == (0, 8)
    assert top_neurons(torch.zeros(3, 8), 8).all()
