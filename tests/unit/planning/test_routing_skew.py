"""Rows of each expert under a spread: they add up, are capped, and the fullest rank comes first."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mone.planning.cost.routing_skew import (
    REPLAYED,
    ZIPF,
    Skew,
    expert_rows,
    hottest,
    parse_skew,
)


def test_balanced_is_none_and_no_rank_is_hot():
    assert expert_rows(Skew(), 64, 2, 8, 4) is None
    assert hottest(None, 4) == 1.0


@given(
    st.floats(0, 4), st.integers(1, 200), st.integers(1, 4), st.sampled_from([4, 8, 16]),
    st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_rows_add_up_and_no_expert_has_more_than_all_tokens(exponent, tokens, topk, experts, ranks):
    rows = expert_rows(Skew(ZIPF, exponent), tokens, topk, experts, ranks)
    assert sum(rows) == tokens * topk
    assert max(rows) <= tokens
    assert min(rows) >= 0
    of_ranks = np.array(rows).reshape(ranks, -1).sum(axis=1)
    assert of_ranks[0] == of_ranks.max()


def test_zipf_shares_fall_as_its_law_says():
    rows = sorted(expert_rows(Skew(ZIPF, 1.0), 100_000, 1, 8, 1), reverse=True)
    shares = [1 / rank for rank in range(1, 9)]
    assert rows == pytest.approx([100_000 * share / sum(shares) for share in shares], abs=1)


def test_a_steeper_law_makes_the_fullest_rank_hotter():
    found = [hottest(expert_rows(Skew(ZIPF, e), 4096, 2, 64, 8), 8) for e in (0, 0.3, 0.6, 1.0)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(1.0, abs=0.01)
    assert found[-1] > 1.5


def profile(tmp_path, layers):
    path = tmp_path / "profile.json"
    rows = [{"layer": i + 1, "rows": rows} for i, rows in enumerate(layers)]
    path.write_text(json.dumps({"runs": [{"routing": {"layers": rows}}]}))
    return path


def test_a_recorded_spread_takes_the_layer_of_median_heat(tmp_path):
    layers = [[10, 10, 10, 10], [25, 5, 5, 5], [16, 8, 8, 8]]
    skew = parse_skew(str(profile(tmp_path, layers)))
    assert skew.kind == REPLAYED
    assert expert_rows(skew, 20, 2, 4, 2) == [16, 8, 8, 8]
    assert hottest([16, 8, 8, 8], 2) == pytest.approx(1.2)


def test_a_recorded_spread_over_other_experts_is_refused(tmp_path):
    skew = parse_skew(str(profile(tmp_path, [[1, 2, 3, 4]])))
    with pytest.raises(ValueError, match="over 4 experts, the model has 8"):
        expert_rows(skew, 20, 2, 8, 2)


@pytest.mark.parametrize("text", ["zipf:x", "zipf:-1", "zipf:9", "even", "/no/such/profile.json"])
def test_a_wrong_spread_is_one_line(text):
    with pytest.raises(ValueError, match="--routing"):
        parse_skew(text)


def test_a_profile_without_experts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run of it has routed rows"):
        parse_skew(str(profile(tmp_path, [])))
