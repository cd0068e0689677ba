"""Times that were measured: looked up before curves and links, and kept in an efficiency's file."""

import json
from dataclasses import replace

import pytest

from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.measured_times import (
    MeasuredTimes,
    between,
    link_key,
    operator_key,
    wait_key,
)
from megatron_mone.planning.cost.rank_cost import collective_seconds, op_seconds
from megatron_mone.planning.tracing.trace import Collective, Op
from tests.unit.planning.made_jobs import CLUSTER, EXACT, FACTS

PRODUCT = Op(
    "aten.mm", ((8, 4), (4, 2)), ((8, 2),), "float32", 160, 64, 128, "attention", "forward"
)  # fmt: skip
GATHER = Collective("all_gather", 1000, "dp-cp", 4, 1, "grad reduce", "forward")
POINTS = ((1000, 1e-3), (3000, 2e-3))


def timed(**measured) -> Efficiency:
    return replace(EXACT, measured=MeasuredTimes(**measured))


def test_an_operator_that_was_timed_is_priced_by_its_time_wherever_it_runs():
    found = timed(operators={operator_key(PRODUCT): 0.5})
    elsewhere = replace(PRODUCT, phase="loss", pass_="backward", count=7)
    assert op_seconds(elsewhere, CLUSTER, found) == 0.5
    for other in (replace(PRODUCT, inputs=((8, 4), (4, 3))), replace(PRODUCT, dtype="bfloat16"),
                  replace(PRODUCT, name="aten.bmm"), replace(PRODUCT, bytes_read=1)):  # fmt: skip
        assert op_seconds(other, CLUSTER, found) == op_seconds(other, CLUSTER, EXACT) != 0.5


def test_a_collective_takes_what_its_like_took():
    found = timed(links={link_key(GATHER): POINTS})
    seconds = {
        size: collective_seconds(replace(GATHER, bytes=size), FACTS, CLUSTER, found)
        for size in (0, 1000, 2000, 3000, 5000)
    }
    assert seconds == pytest.approx({0: 1e-3, 1000: 1e-3, 2000: 1.5e-3, 3000: 2e-3, 5000: 3e-3})
    # Four ranks of one domain sit alike, whatever their distance; four of two domains do not.
    apart, far = replace(GATHER, stride=2), replace(GATHER, stride=4)
    assert collective_seconds(apart, FACTS, CLUSTER, found) == 1e-3
    assert collective_seconds(far, FACTS, CLUSTER, found) != 1e-3
    assert collective_seconds(replace(GATHER, ranks=2), FACTS, CLUSTER, found) != 1e-3


def test_what_a_step_waits_comes_first_in_its_group_and_tells_of_other_sizes():
    found = timed(
        links={link_key(GATHER): POINTS},
        waits={wait_key(GATHER): ((1000, 4e-3), (100_000, 9.0))},
    )
    assert found.measured.waited(GATHER)
    others = replace(GATHER, group="edp"), replace(GATHER, stride=2), replace(GATHER, ranks=2)
    assert not any(found.measured.waited(one) for one in others)
    assert collective_seconds(GATHER, FACTS, CLUSTER, found) == 4e-3
    assert collective_seconds(others[0], FACTS, CLUSTER, found) == 1e-3
    more = replace(GATHER, bytes=3000)  # by itself 2 ms, and ranks are late by 3
    assert collective_seconds(more, FACTS, CLUSTER, found) == pytest.approx(5e-3)
    hidden = timed(links={link_key(GATHER): POINTS}, waits={wait_key(GATHER): ((1000, 2e-4),)})
    assert collective_seconds(more, FACTS, CLUSTER, hidden) == pytest.approx(4e-4)
    alone = timed(waits={wait_key(GATHER): POINTS})
    assert collective_seconds(replace(GATHER, bytes=2000), FACTS, CLUSTER, alone) == 1.5e-3


def test_stages_exchange_by_the_two_of_them():
    send = Collective("send", 1000, "pp", 8, 2, "pipeline bubble", "forward")
    assert link_key(send) == link_key(replace(send, kind="recv", ranks=4)) == ("send", 2, 2)


def test_noise_that_falls_with_the_size_is_no_bandwidth():
    assert between(((1000, 2e-3), (3000, 1e-3)), 9000) == 2e-3
    assert between(((1000, 2e-3), (3000, 1e-3)), 3000) == 1e-3
    assert between(((1000, 2e-3),), 500) == 2e-3
    assert between(((1000, 2e-3),), 2000) == 4e-3


def test_a_file_holds_them_and_one_without_is_as_it_was(tmp_path):
    path = tmp_path / "efficiency.json"
    found = timed(
        operators={operator_key(PRODUCT): 0.5}, links={link_key(GATHER): POINTS},
        phases={"loss": 2.0}, waits={wait_key(GATHER): POINTS},
    )  # fmt: skip
    found.write(path)
    assert Efficiency.read(path) == found
    EXACT.write(path)
    assert Efficiency.read(path) == EXACT
    assert "measured" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("operators", 0, "seconds"), -1, "measured.operators[0].seconds"),
        (("operators", 0, "inputs"), 3, "measured.operators[0].inputs: must be a list"),
        (("links", 0, "points"), [], "[bytes, seconds] with rising bytes"),
        (("links", 0, "points"), [[2, 1.0], [1, 1.0]], "[bytes, seconds] with rising bytes"),
        (("links", 0, "points"), [[2]], "must be [bytes, seconds]"),
        (("links", 0, "ranks"), 0, "ranks and stride must be 1 or more"),
        (("waits", 0, "stride"), 0, "ranks and stride must be 1 or more"),
        (("waits", 0, "points"), [], "[bytes, seconds] with rising bytes"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, place, value, said):
    path = tmp_path / "efficiency.json"
    timed(
        operators={operator_key(PRODUCT): 0.5}, links={link_key(GATHER): POINTS},
        waits={wait_key(GATHER): POINTS},
    ).write(path)  # fmt: skip
    document = json.loads(path.read_text())
    section, row, name = place
    document["measured"][section][row][name] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"efficiency\.json: ") as error:
        Efficiency.read(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
