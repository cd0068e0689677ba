"""Requests in passes: each once, the longest first, the same rows on every rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mone.evaluation.batches import passes, width_of


@given(
    st.lists(st.integers(1, 50), max_size=40), st.integers(1, 4), st.integers(1, 3),
    st.integers(1, 5),
)  # fmt: skip
def test_every_request_is_in_one_pass_of_one_replica(lengths, replicas, micro, batch):
    found = passes(lengths, replicas, micro, batch)
    dealt = [i for step in found for one in step.dealt for i in one]
    assert sorted(dealt) == list(range(len(lengths)))
    for step in found:
        assert len(step.dealt) == replicas
        assert step.rows % micro == 0
        assert all(len(one) <= step.rows <= micro * batch for one in step.dealt)
    longest = [max(lengths[i] for one in step.dealt for i in one) for step in found]
    assert longest == sorted(longest, reverse=True)


def test_a_short_pass_has_no_rows_of_padding_beyond_whole_micro_batches():
    (step,) = passes([5, 9, 7], replicas=2, micro=2, batch=8)
    assert step.dealt == ((1, 0), (2,))
    assert step.rows == 2


@pytest.mark.parametrize(("length", "multiple", "width"), [(7, 1, 7), (7, 2, 8), (8, 4, 8)])
def test_a_pass_is_as_wide_as_sequence_parallelism_asks(length, multiple, width):
    assert width_of(length, multiple) == width
