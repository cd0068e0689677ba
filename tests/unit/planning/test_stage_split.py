"""Splits of layers over stages, and the least time of a schedule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.planning.cost.pipeline import Schedule, simulate
from megatron_mone.planning.stage_split import (
    Shape,
    balanced_split,
    even_split,
    held_micro_batches,
    layout_text,
    least_seconds,
    split_stages,
)


def shape_of(stages, chunks, times):
    return Shape(stages, chunks if stages > 1 else 1, stages * times, stages)


SHAPES = st.builds(
    shape_of,
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 4),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_no_schedule_is_faster_than_the_bound(shape, seed):
    random = np.random.default_rng(seed)
    places = (shape.stages, shape.chunks)
    forward, backward = random.uniform(0.2, 3, places), random.uniform(0.2, 3, places)
    schedule = Schedule(*places[:1], shape.micro_batches, shape.chunks)
    run = simulate(schedule, forward, backward)
    assert least_seconds(shape, forward, backward) <= run.seconds * (1 + 1e-9)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_bound_of_equal_stages_is_their_time(stages):
    """M + P - 1 passes each way."""
    shape = Shape(stages, 1, 8, stages)
    forward = np.full((stages, 1), 1.0)
    assert least_seconds(shape, forward, 2 * forward) == pytest.approx(3 * (8 + stages - 1))


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_what_a_chunk_holds_is_the_schedules(shape):
    """After a stage's first forward of 1F1B, of which the next pass is its first backward."""
    schedule = Schedule(shape.stages, shape.micro_batches, shape.chunks)
    held = held_micro_batches(shape)
    for stage in range(shape.stages):
        order = schedule.order(stage)
        first = next(place for place, work in enumerate(order) if not work.forward)
        assert schedule.in_flight(stage)[first - 1] == held[stage].tolist()


def passes(layer, embedding, head, stages):
    def of(split):
        cost = layer * np.array(split, dtype=float)
        cost[0] += embedding
        cost[-1] += head
        both = cost.reshape(-1, stages).T
        return both, 2 * both

    return of


def test_a_heavy_head_takes_the_place_of_layers():
    of = passes(1.0, 0.1, 4.0, 4)
    split = balanced_split(46, Shape(4, 1, 64, 4), of)
    assert sum(split) == 46
    assert split[-1] <= min(split[:-1]) - 3
    even = least_seconds(Shape(4, 1, 64, 4), *of((12, 12, 11, 11)))
    assert least_seconds(Shape(4, 1, 64, 4), *of(split)) < 0.9 * even


def test_an_even_split_of_equal_stages_stays():
    assert balanced_split(16, Shape(4, 2, 8, 4), passes(1.0, 0.0, 0.0, 4)) == (2,) * 8
    assert even_split(16, 4, 2) == (2,) * 8
    assert even_split(46, 4, 1) is None


def test_a_split_in_megatrons_words():
    assert layout_text((3, 4, 4, 2), 1) == "Et*3|t*4|t*4|t*2mL"
    assert layout_text((0, 4, 4, 0), 0) == "E|t*4|t*4|L"
    kinds = ("dense", *("moe",) * 7)
    keys = [stage.key for stage in split_stages((2, 3, 3), kinds, 0)]
    assert keys == ["embedding, dense*1, moe*1", "moe*3", "moe*3, norm, head"]
    with_mtp = [stage.key for stage in split_stages((4, 4, 0), kinds, 1)]
    assert with_mtp == ["embedding, dense*1, moe*3", "moe*4, norm", "no layer, mtp*1, head"]
