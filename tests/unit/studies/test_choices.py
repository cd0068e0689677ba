"""Measures of routing and masks on choices that are made up, by hand."""

import pytest
import torch

from megatron_mone.studies.measuring import choices
from megatron_mone.studies.measuring.token_classes import CLASSES, class_of, classes_of


def rows(*lines: str) -> torch.Tensor:
    """ "x.x" is a row that chose the first and the third."""
    return torch.tensor([[one == "x" for one in line] for line in lines])


def test_saturation_is_the_share_of_the_last_choice_that_was_there():
    now, last = rows("xx..", "x.x.", ".xx."), rows("xx..", ".xx.", "x..x")
    assert choices.saturation(now, last) == pytest.approx((1 + 0.5 + 0) / 3)
    assert choices.saturation(last, last) == 1


def test_saturation_by_use_alone():
    """All use one half by lot: half of a choice is found again; all use the same: all of it."""
    either = rows("xx..", "..xx")
    assert choices.by_use(either, either) == pytest.approx(0.5)
    same = rows("xx..", "xx..")
    assert choices.by_use(same, same) == pytest.approx(1)


def test_co_activation_is_of_those_that_chose_the_first():
    chosen = rows("xx.", "x.x", "xx.", "...")
    expected = [[1, 2 / 3, 1 / 3], [1, 1, 0], [1, 0, 1]]
    torch.testing.assert_close(choices.co_activation(chosen), torch.tensor(expected))
    assert choices.largest_partner(chosen) == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert choices.largest_partner(chosen, least=2) == pytest.approx((2 / 3 + 1) / 2)
    assert choices.co_activation(rows("x.", "x."))[1].tolist() == [0, 0]  # never chosen


def test_a_shuffle_keeps_use_and_loses_company():
    chosen = torch.zeros(400, 4, dtype=torch.bool)
    chosen[:100, :2], chosen[100:200, 2:] = True, True
    mixed = choices.shuffled(chosen, torch.Generator().manual_seed(1))
    assert mixed.sum(0).tolist() == chosen.sum(0).tolist()
    assert choices.largest_partner(chosen) == 1
    assert choices.largest_partner(mixed) < 0.4


def test_specialisation_is_a_share_of_the_class():
    chosen = rows("x.", "x.", ".x", "x.")
    found = choices.specialisation(chosen, torch.tensor([0, 0, 0, 2]), 3)
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3], [0, 0], [1, 0]]))
    assert choices.favourite_share(chosen, torch.tensor([0, 0, 0, 2]), 1) == pytest.approx(3 / 4)
    assert choices.favourite_share(chosen, torch.tensor([0, 0, 0, 2]), 2) == pytest.approx(2 / 3)


def test_neighbours_that_use_the_same_need_no_more():
    same, apart = rows("x...", "x...", "x...", "x..."), rows("x...", ".x..", "..x.", "...x")
    assert [choices.used_by_chunks(same, k) for k in (1, 2, 4)] == [0.25, 0.25, 0.25]
    assert [choices.used_by_chunks(apart, k) for k in (1, 2, 4)] == [0.25, 0.5, 1]
    assert choices.used_by_chunks(apart, 3) == 0.75  # the fourth is left over
    assert choices.used_by_chunks(apart, 8) == 0  # no whole chunk
    assert choices.used_by_chunks(apart[:0], 1) == 0  # an expert that nobody chose
    mixed = rows("x...", ".x..", ".x..", "..x.")
    assert choices.used_by_chunks(mixed, 2, window=2) == 0.5
    assert choices.used_by_chunks(rows("x.", "x.", ".x", "x.", "x.", ".x"), 2, window=3) == 0.5


def test_use_by_chance_is_of_rows_that_choose_apart():
    used = rows("xx..", "x.x.")
    assert choices.used_by_chance(used, 2) == pytest.approx((1 + 0.75 + 0.75 + 0) / 4)
    assert choices.used_by_chance(used, 1) == choices.used_by_chunks(used, 1) == 0.5


def test_similarity_is_the_size_of_a_cosine():
    """Of (3, 4) with (-3, -4), of each with (4, -3), and with (0, 5)."""
    assert choices.similarity(torch.tensor([[3.0, 4], [-3, -4], [4, -3]])) == pytest.approx(1 / 3)
    assert choices.similarity(torch.tensor([[3.0, 4], [0, 5]])) == pytest.approx(0.8)


def test_matched_neurons_are_found_in_any_order():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(6, 9, generator=generator)
    other = one[torch.randperm(6, generator=generator)] * 3
    assert choices.matched_similarity(torch.stack([one, other])) == pytest.approx(1)
    assert choices.similarity(torch.stack([one, other]).flatten(1)) < 0.9
    assert choices.similarity(torch.stack([one, 2 * one, one]).flatten(1)) == pytest.approx(1)
    far = torch.stack([one, -one.abs()])
    assert choices.matched_similarity(far) < 0.9


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        (" King", ",", "word start"),
        ("he", "\n  ", "word start"),
        ("ther", " W", "continuation"),
        ("tis", "'", "word start"),
        (".", "T", "punctuation"),
        (" '", " that", "punctuation"),
        ("\n ", ".", "newline"),
        ("  ", "\n", "space"),
        (" 15", "x", "digit"),
        ("HAM", "\n", "capitals"),
        ("I", " ", "word start"),
    ],
)
def test_a_token_has_a_class(text, before, expected):
    assert class_of(text, before) == expected


def test_classes_of_a_text():
    found = [CLASSES[n] for n in classes_of(["The", " old", "er", "\n", "tree"])]
    assert found == ["word start", "word start", "continuation", "newline", "word start"]
