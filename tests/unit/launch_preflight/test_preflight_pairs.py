"""Who meets whom in which round, and whose fault a failed pair is."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.preflight.pairs import guilty_nodes, pair_rounds


def outcome(nodes: int, bad: set[int]) -> tuple[list, list]:
    """The pairs that go well and those that fail if exactly the pairs of bad nodes fail."""
    pairs = list(itertools.chain.from_iterable(pair_rounds(nodes)))
    failed = [pair for pair in pairs if bad & set(pair)]
    return [pair for pair in pairs if pair not in failed], failed


@given(st.integers(1, 300))
def test_every_node_meets_those_at_distance_one_and_two_once(nodes: int) -> None:
    rounds = pair_rounds(nodes)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == sorted(
        (i, i + far) for i in range(nodes) for far in (1, 2) if i + far < nodes
    )
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        assert len(set(busy)) == len(busy)


def test_the_first_rounds_are_along_the_list() -> None:
    assert pair_rounds(5)[:2] == (((0, 1), (2, 3)), ((1, 2), (3, 4)))
    assert pair_rounds(2) == (((0, 1),),)
    assert pair_rounds(1) == ()


@given(st.data(), st.integers(4, 40))
def test_bad_nodes_that_are_not_side_by_side_are_named_exactly(data: st.DataObject, nodes) -> None:
    """The theorem of `guilty_nodes`, also with every other node bad."""
    bad: set[int] = set()
    for node in range(nodes):
        if node - 1 not in bad and data.draw(st.booleans()):
            bad.add(node)
    assert guilty_nodes(*outcome(nodes, bad)) == bad


@pytest.mark.parametrize("bad", [{3, 4}, {0, 1}, {14, 15}])
def test_two_bad_neighbours_are_named_too(bad: set[int]) -> None:
    assert guilty_nodes(*outcome(16, bad)) == bad


def test_one_of_three_is_named() -> None:
    assert [guilty_nodes(*outcome(3, {node})) for node in range(3)] == [{0}, {1}, {2}]


@pytest.mark.parametrize("bad", [{0}, {1}, {0, 1}])
def test_of_two_nodes_none_is_named(bad: set[int]) -> None:
    assert guilty_nodes(*outcome(2, bad)) == set()


def test_a_link_that_fails_between_good_nodes_is_nobody_s_fault() -> None:
    good, _ = outcome(6, set())
    good.remove((2, 3))
    assert guilty_nodes(good, [(2, 3)]) == set()


def test_if_all_pairs_fail_nobody_is_named() -> None:
    assert guilty_nodes(*outcome(8, set(range(8)))) == set()
