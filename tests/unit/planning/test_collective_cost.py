"""Collectives: closed forms derived here, an exact count where there is one, and what must hold.

The clusters are made up with round figures, so that an expected time is a sum one can do by hand.
"""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mone.common.device import Device
from megatron_mone.planning.cost.collectives import (
    FREE,
    OPERATIONS,
    CollectiveCost,
    Links,
    Placement,
    collective_cost,
    expected_parts,
    hierarchical_dispatch_cost,
    pairwise_parts,
    place_stride,
)
from megatron_mone.planning.cost.hardware import Cluster, Domain, Network, load_cluster

INSIDE, OUTSIDE = 1e-6, 5e-6  # latencies of `made_up`


def made_up(domain=(), network=(), launch_latency=0.0) -> Cluster:
    """Domains of 8 at 100 GB/s, cards of 10 GB/s, leaves of 4 nodes, but for fields given."""
    return Cluster(
        "made-up",
        Device("none", {"bf16": 1e15}, 2.0**36, 1e12),
        8,
        replace(Domain(8, 100e9, 100e9, INSIDE, 1.0), **dict(domain)),
        replace(Network(10e9, OUTSIDE, 8, 4, 1.0, 1.0), **dict(network)),
        launch_latency,
        {},
    )


def seconds(operation: str, size: float, placement: Placement, cluster: Cluster) -> float:
    return collective_cost(operation, size, placement, cluster).seconds


def place_ranks(ranks: list[int], cluster: Cluster) -> Placement:
    """The placement of a group that is given rank by rank.

    Raises:
        ValueError: no rank, a rank twice, or a negative one.
    """
    if not ranks or len(set(ranks)) != len(ranks) or min(ranks) < 0:
        raise ValueError(
            f"ranks = {str(list(ranks))[:60]} is no group: give distinct ranks from 0, at least one"
        )
    domains = Counter(rank // cluster.domain.devices for rank in ranks)
    leaves = Counter(rank // cluster.leaf_devices for rank in ranks)
    return Placement(
        len(ranks), max(domains.values()), len(domains), max(leaves.values()), len(leaves)
    )


def serial_all_to_all_cost(size: float, placement: Placement, cluster: Cluster) -> CollectiveCost:
    """An all-to-all by NVLink and the network in turn; `collective_cost` has both at once."""
    if placement.size == 1:
        return FREE
    parts = pairwise_parts(size, placement, Links.of(placement, cluster))
    return CollectiveCost(cluster.launch_latency + sum(parts), "pairwise in turn")


# Placement


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        (8, 1, Placement(8, 8, 1, 8, 1)),
        (4, 2, Placement(4, 4, 1, 4, 1)),
        (16, 1, Placement(16, 8, 2, 16, 1)),
        (8, 8, Placement(8, 1, 8, 4, 2)),
        (4, 3, Placement(4, 3, 2, 4, 1)),  # ranks 0, 3, 6 | 9
        (2, 32, Placement(2, 1, 2, 1, 2)),
    ],
)
def test_a_stride_places_ranks_over_domains_and_leaves(size, stride, expected):
    assert place_stride(size, stride, made_up()) == expected


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_stride_is_its_ranks_one_by_one(size, stride):
    ranks = [i * stride for i in range(size)]
    placement = place_stride(size, stride, made_up())
    assert placement == place_ranks(ranks, made_up())
    domains = [rank // 8 for rank in ranks]
    assert placement.domains == len(set(domains))
    assert placement.per_domain == max(map(domains.count, domains))


@pytest.mark.parametrize("ranks", [[], [1, 1], [-1, 0]])
def test_what_is_no_group_is_refused(ranks):
    with pytest.raises(ValueError, match="is no group"):
        place_ranks(ranks, made_up())


@pytest.mark.parametrize(("size", "stride"), [(0, 1), (2, 0)])
def test_a_stride_needs_a_size(size, stride):
    with pytest.raises(ValueError, match="must be 1 or more"):
        place_stride(size, stride, made_up())


# Closed forms


def test_ring_all_reduce_in_a_domain():
    """2 (n - 1) messages, and 2 (n - 1) / n of the bytes through every link."""
    cost = collective_cost("all_reduce", 8e9, place_stride(8, 1, made_up()), made_up())
    assert cost.algorithm == "ring"
    assert cost.seconds == pytest.approx(14 * INSIDE + 14e9 / 100e9)


def test_all_gather_takes_the_part_and_reduce_scatter_the_whole():
    group = place_stride(4, 1, made_up())
    expected = 3 * INSIDE + 3e9 / 100e9  # three parts of 1 GB come in
    assert seconds("all_gather", 1e9, group, made_up()) == pytest.approx(expected)
    assert seconds("reduce_scatter", 4e9, group, made_up()) == pytest.approx(expected)


def test_one_rank_a_domain_uses_the_network_alone():
    group = place_stride(4, 8, made_up())
    expected = 6 * OUTSIDE + 2 * 3 / 4 * 1e9 / 10e9
    assert seconds("all_reduce", 1e9, group, made_up()) == pytest.approx(expected)


def test_a_small_all_reduce_takes_the_tree():
    """Up and down 10 levels of the tree, against 2 x 1,023 messages around the ring."""
    group = place_stride(1024, 8, made_up())
    cost = collective_cost("all_reduce", 8, group, made_up())
    assert cost.algorithm == "tree"
    assert cost.seconds == pytest.approx(2 * 10 * OUTSIDE, rel=1e-3)


def test_hierarchical_all_reduce():
    """Over 4 domains with slow cards: 14 messages inside, 2 x 3 outside with an eighth of the
    bytes, where flat algorithms send all bytes over the slow edges' 8 cards."""
    cluster, size = made_up(network={"bandwidth": 2e9}), 1e9
    inside = 14 * INSIDE + 2 * 7 / 8 * size / 100e9
    outside = 6 * OUTSIDE + 2 * 3 / 4 * size / 8 / 2e9
    cost = collective_cost("all_reduce", size, place_stride(32, 1, cluster), cluster)
    assert cost.algorithm == "hierarchical"
    assert cost.seconds == pytest.approx(inside + outside)


def test_a_small_hierarchical_gather_saves_messages():
    """8 bytes from 32 ranks: 3 messages outside and 7 inside, against 31 around the ring."""
    for operation, size in (("all_gather", 8), ("reduce_scatter", 8 * 32)):
        cost = collective_cost(operation, size, place_stride(32, 1, made_up()), made_up())
        assert cost.algorithm == "hierarchical"
        assert cost.seconds == pytest.approx(3 * OUTSIDE + 7 * INSIDE, rel=1e-2)


def test_a_large_flat_ring_is_bound_by_the_cards_of_a_domain():
    """8 cards of 10 GB/s carry less than NVLink's 100 GB/s."""
    group, size = place_stride(32, 1, made_up()), 1e12
    expected = 2 * 31 / 32 * size / 80e9
    hierarchical = 2 * 7 / 8 * size / 100e9 + 2 * 3 / 4 * size / 8 / 10e9
    assert expected < hierarchical
    assert seconds("all_reduce", size, group, made_up()) == pytest.approx(expected, rel=1e-3)


def test_pairwise_all_to_all_by_counting_every_message():
    """Walk all pairs of 16 ranks on 2 nodes with 2 rails; the busiest resource decides."""
    cluster = made_up(network={"rails": 2})
    size, n = 16e9, 16
    nvlink, card = [0.0] * n, [0.0] * n
    for source, target in itertools.permutations(range(n), 2):
        if source // 8 == target // 8:
            nvlink[source] += size / n
        else:
            card[source] += size / n
            if source % 2 != target % 2:  # to the target's rail first
                nvlink[source] += size / n
    group = place_stride(n, 1, cluster)
    # At most 8 messages at once: 7 peers inside are one round, 8 outside another.
    inside, outside = INSIDE + nvlink[0] / 100e9, OUTSIDE + card[0] / 10e9
    assert seconds("all_to_all", size, group, cluster) == pytest.approx(max(inside, outside))
    serial = serial_all_to_all_cost(size, group, cluster).seconds
    assert serial == pytest.approx(inside + outside)


def test_a_mesh_gives_two_devices_one_link_and_all_devices_all_links():
    mesh = made_up(domain={"pair_bandwidth": 100e9 / 7})
    for ranks in (2, 8):
        got = seconds("all_gather", 1e9, place_stride(ranks, 1, mesh), mesh)
        rate = (ranks - 1) * 100e9 / 7
        assert got == pytest.approx((ranks - 1) * INSIDE + (ranks - 1) * 1e9 / rate)
    assert seconds("send", 1e9, place_stride(2, 1, mesh), mesh) == pytest.approx(INSIDE + 0.07)


def test_broadcast_and_send():
    pair = place_ranks([3, 11], made_up())
    assert seconds("send", 1e9, pair, made_up()) == pytest.approx(OUTSIDE + 0.1)
    assert seconds("recv", 1e9, pair, made_up()) == seconds("send", 1e9, pair, made_up())
    group = place_stride(8, 1, made_up())
    assert seconds("broadcast", 1e9, group, made_up()) == pytest.approx(7 * INSIDE + 0.01)


def test_oversubscription_counts_where_traffic_leaves_the_leaf():
    """2 leaves of 4 nodes. A ring crosses a leaf on one edge in 4; with an all-to-all of one rank
    a node, 4 of the 7 peers are behind the other leaf."""
    group, size = place_stride(8, 8, made_up()), 1e12
    plain = made_up()
    for over in (2.0, 8.0):
        slow = made_up(network={"oversubscription": over})
        ring = seconds("reduce_scatter", size, group, slow)
        assert ring / seconds("reduce_scatter", size, group, plain) == pytest.approx(
            max(1.0, over / 4), rel=1e-3
        )
        spread = seconds("all_to_all", size, group, slow)
        assert spread / seconds("all_to_all", size, group, plain) == pytest.approx(
            max(1.0, over * 4 / 7), rel=1e-3
        )
    one_leaf = place_stride(4, 8, plain)
    slow = made_up(network={"oversubscription": 8.0})
    assert seconds("all_to_all", size, one_leaf, slow) == seconds(
        "all_to_all", size, one_leaf, plain
    )


def test_every_collective_pays_its_launch_once():
    late = made_up(launch_latency=1e-3)
    for operation in OPERATIONS:
        pair = place_ranks([0, 1], late)
        extra = seconds(operation, 1e6, pair, late) - seconds(operation, 1e6, pair, made_up())
        assert extra == pytest.approx(1e-3)


def test_figures_of_a_collective_inside_a_domain_hold_there_alone():
    plain = made_up()
    slow = replace(
        plain, domain=replace(plain.domain, efficiency=0.5, latency=0.0), launch_latency=1e-3
    )
    told = replace(plain, inside={"all_to_all": slow})
    inside, across = place_ranks(list(range(8)), plain), place_ranks([0, 8], plain)
    found = seconds("all_to_all", 8e6, inside, told)
    assert found == pytest.approx(1e-3 + 7e6 / 50e9)
    assert seconds("all_to_all", 8e6, across, told) == seconds("all_to_all", 8e6, across, plain)
    assert seconds("all_reduce", 8e6, inside, told) == seconds("all_reduce", 8e6, inside, plain)


# Hierarchical dispatch


def test_expected_parts_by_listing_every_choice():
    """8 experts on 4 ranks, 3 chosen: the mean over all 56 choices."""
    choices = list(itertools.combinations(range(8), 3))
    mean = sum(len({expert // 2 for expert in choice}) for choice in choices) / len(choices)
    assert expected_parts(3, 8, 4) == pytest.approx(mean)


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_expected_parts_is_between_one_and_what_can_be(parts, each, data):
    chosen = data.draw(st.integers(1, parts * each))
    got = expected_parts(chosen, parts * each, parts)
    assert 1 - 1e-9 <= got <= min(parts, chosen) + 1e-9


def test_hierarchical_dispatch_crosses_the_network_once_a_domain():
    """16 ranks on 2 nodes, 8 experts a token: 7 kB x 1,000 tokens once to the other node, and to
    6 ranks by NVLink, of which one in 8 is where the token is already."""
    cluster = made_up()
    group = place_stride(16, 1, cluster)
    cost = hierarchical_dispatch_cost(1000, 7e3, 2.0, 6.0, group, cluster)
    network = 1000 * 7e3 * 1 / 10e9
    nvlink = 1000 * 7e3 * 6 * 7 / 8 / 100e9
    assert cost.seconds == pytest.approx(INSIDE + OUTSIDE + max(network, nvlink))
    # Pairwise, the 8 copies of a token all travel on their own.
    assert cost.seconds < seconds("all_to_all", 8 * 1000 * 7e3, group, cluster)


def test_hierarchical_dispatch_may_be_bound_by_nvlink():
    """On one node, 5 of 8 ranks a token: the copy for the rank itself moves nowhere."""
    group = place_stride(8, 1, made_up())
    cost = hierarchical_dispatch_cost(1000, 7e3, 1.0, 5.0, group, made_up())
    assert cost.seconds == pytest.approx(INSIDE + 1000 * 7e3 * 5 * 7 / 8 / 100e9)


def test_a_dispatch_to_more_places_than_there_are_is_refused():
    group = place_stride(16, 1, made_up())
    with pytest.raises(ValueError, match="more than the 2 domains"):
        hierarchical_dispatch_cost(1, 1, 3.0, 3.0, group, made_up())
    uneven = place_stride(12, 1, made_up())
    with pytest.raises(ValueError, match="uneven"):
        hierarchical_dispatch_cost(1, 1, 1.0, 1.0, uneven, made_up())
    with pytest.raises(ValueError, match="must divide"):
        expected_parts(2, 8, 3)


# Properties

COLLECTIVES = [name for name in OPERATIONS if name not in ("send", "recv")]
groups = st.builds(place_stride, st.integers(1, 64), st.integers(1, 40), st.just(made_up()))
sizes = st.floats(0, 1e12)
factors = st.floats(1.0, 100.0)


@st.composite
def cases(draw):
    """(operation, group): sends only in a pair."""
    operation = draw(st.sampled_from(sorted(OPERATIONS)))
    group = draw(groups)
    if operation in ("send", "recv"):
        group = place_ranks([0, draw(st.integers(1, 500))], made_up())
    return operation, group


@given(cases(), sizes, factors)
def test_never_negative_and_monotone_in_bytes(case, size, factor):
    operation, group = case
    less, more = (seconds(operation, s, group, made_up()) for s in (size, size * factor))
    assert 0 <= less <= more


@given(cases(), sizes, factors, st.sampled_from(["domain", "network"]))
def test_never_slower_with_more_bandwidth_or_less_latency(case, size, factor, part):
    operation, group = case
    base = made_up(network={"oversubscription": 3.0})
    links = getattr(base, part)
    changes = [{"latency": links.latency / factor}]
    wider = {"bandwidth": links.bandwidth * factor}
    if part == "domain":
        wider["pair_bandwidth"] = links.pair_bandwidth * factor
        changes.append({"efficiency": links.efficiency})
    else:
        changes.append({"oversubscription": max(1.0, links.oversubscription / factor)})
    for change in [*changes, wider]:
        better = replace(base, **{part: replace(links, **change)})
        assert seconds(operation, size, group, better) <= seconds(operation, size, group, base)


@given(st.sampled_from(COLLECTIVES), sizes, st.integers(0, 1000))
def test_a_group_of_one_is_free(operation, size, rank):
    late = made_up(launch_latency=1.0)
    alone = place_ranks([rank], late)
    assert seconds(operation, size, alone, late) == 0.0
    assert serial_all_to_all_cost(size, alone, late).seconds == 0.0
    assert hierarchical_dispatch_cost(size, 1.0, 1.0, 1.0, alone, late).seconds == 0.0


@given(st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]), sizes, groups)
def test_never_worse_than_a_flat_ring(operation, size, group):
    n, m, d = group.size, group.per_domain, group.domains
    passes = 2 if operation == "all_reduce" else 1
    volume = passes * (n - 1) / n * size * (n if operation == "all_gather" else 1)
    rate = min(100e9 if m > 1 else math.inf, m * 10e9 if d > 1 else math.inf)
    ring = passes * ((n - d) * INSIDE + (d - 1) * OUTSIDE) + volume / rate
    assert seconds(operation, size, group, made_up()) <= ring * (1 + 1e-9)


@given(sizes, groups)
def test_turns_are_never_faster_than_both_at_once(size, group):
    both = seconds("all_to_all", size, group, made_up())
    assert both <= serial_all_to_all_cost(size, group, made_up()).seconds <= 2 * both


@given(st.sampled_from(["gb200-nvl72", "h100-ndr", "mi300x-ndr"]), st.integers(1, 256), sizes)
def test_shipped_clusters_give_finite_times(name, size, volume):
    cluster = load_cluster(name)
    group = place_stride(size, 1, cluster)
    for operation in COLLECTIVES:
        assert 0 <= seconds(operation, volume, group, cluster) < math.inf


def test_a_larger_domain_keeps_an_all_to_all_off_the_network():
    volume = 100e6
    rack, node = load_cluster("gb200-nvl72"), load_cluster("b200-ndr")
    times = [seconds("all_to_all", volume, place_stride(64, 1, c), c) for c in (rack, node)]
    assert times[0] < times[1] / 5


@pytest.mark.parametrize(
    ("operation", "size", "ranks", "fault"),
    [
        ("all_reduced", 1, [0, 1], "did you mean 'all_reduce'"),
        ("all_reduce", -1, [0, 1], "0 or more"),
        ("all_reduce", math.nan, [0, 1], "0 or more"),
        ("send", 1, [0, 1, 2], "between 2 ranks, not 3"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(operation, size, ranks, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        collective_cost(operation, size, place_ranks(ranks, made_up()), made_up())
    assert "\n" not in str(caught.value)
