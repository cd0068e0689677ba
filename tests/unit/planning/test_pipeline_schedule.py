"""Pipeline schedules: Megatron's own order and counts, closed forms, what any times must obey."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mone.planning.cost.pipeline import (
    Schedule,
    exposed_communication,
    peak_activations,
    simulate,
)

SIZES = [(1, 3), (2, 1), (2, 8), (4, 3), (4, 16), (8, 8)]  # (stages, micro-batches)
INTERLEAVED = [(2, 4, 2, None), (4, 8, 3, None), (4, 18, 2, 7), (2, 5, 2, 3), (4, 4, 2, None)]


@st.composite
def schedules(draw):
    """Any schedule that Megatron accepts, up to 5 stages, 3 chunks and 12 micro-batches."""
    stages = draw(st.integers(1, 5))
    chunks = draw(st.integers(1, 3)) if stages > 1 else 1
    if chunks == 1:
        return Schedule(stages, draw(st.integers(1, 12)))
    group = draw(st.integers(stages, stages + 2))
    whole = group * draw(st.integers(1, 2))
    rest = draw(st.sampled_from([0, *range(stages, group)]))
    return Schedule(stages, whole + rest, chunks, group, draw(st.booleans()))


@st.composite
def runs(draw):
    """(schedule, forward [P, V, M], backward [P, V, M], transfer) with times that differ."""
    schedule = draw(schedules())
    shape = (schedule.stages, schedule.chunks, schedule.micro_batches)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    forward, backward = rng.uniform(0, 2, shape), rng.uniform(0, 4, shape)
    return schedule, forward, backward, draw(st.sampled_from([0.0, 0.1, 1.0]))


# Megatron's order


class Group:
    """What Megatron's counts ask of a process group."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


class Communicator:
    def __init__(self, rank, size, chunks):
        self.pp_group = Group(rank, size)
        self.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None


@pytest.mark.parametrize(("stages", "micro_batches", "chunks", "group"), INTERLEAVED)
def test_forward_order_is_megatrons_table(stages, micro_batches, chunks, group):
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(micro_batches, chunks, group or stages)
    schedule = Schedule(stages, micro_batches, chunks, group)
    for stage in range(stages):
        order = schedule.order(stage)
        assert [(w.micro_batch, w.chunk) for w in order if w.forward] == table
        mirrored = [(m, chunks - 1 - c) for m, c in table]
        assert [(w.micro_batch, w.chunk) for w in order if not w.forward] == mirrored


@pytest.mark.parametrize(
    ("stages", "micro_batches", "chunks", "group", "extra"),
    [
        *((p, m, 1, None, False) for p, m in SIZES),
        *((*sizes, extra) for sizes in INTERLEAVED for extra in (False, True)),
    ],
)
def test_warmup_is_megatrons_count(stages, micro_batches, chunks, group, extra):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    schedule = Schedule(stages, micro_batches, chunks, group, extra)
    for stage in range(stages):
        _, _, warmup, remaining = get_pp_rank_microbatches(
            micro_batches,
            chunks,
            group or stages,
            overlap_moe_expert_parallel_comm=extra,
            p2p_communicator=Communicator(stage, stages, chunks),
        )
        order = schedule.order(stage)
        first_backward = [w.forward for w in order].index(False)
        # The 1F1B phase begins with a forward, if it has any.
        assert first_backward == warmup + (remaining > 0)
        assert sum(w.forward and w.steady for w in order) == remaining
        assert sum(w.steady for w in order) == 2 * remaining


@given(schedules())
def test_every_pass_runs_once_and_its_forward_first(schedule):
    for stage in range(schedule.stages):
        order = schedule.order(stage)
        passes = [(w.forward, w.micro_batch, w.chunk) for w in order]
        assert len(set(passes)) == len(passes)
        assert len(passes) == 2 * schedule.micro_batches * schedule.chunks
        for position, (forward, m, chunk) in enumerate(passes):
            assert forward or (True, m, chunk) in passes[:position]


# Closed forms


def busy(run):
    """[P] seconds each stage computes."""
    stages = range(run.schedule.stages)
    return np.array([sum(e.end - e.start for e in run.events if e.stage == p) for p in stages])


def most_in_flight(schedule, stage):
    """[V] the most micro-batches of a chunk that wait for their backward at once."""
    return np.max(schedule.in_flight(stage), axis=0)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_uniform_1f1b_takes_m_plus_p_minus_1_turns(stages, micro_batches):
    f, b = 1.0, 2.5
    run = simulate(Schedule(stages, micro_batches), f, b)
    assert run.seconds == pytest.approx((micro_batches + stages - 1) * (f + b))
    np.testing.assert_allclose(busy(run), micro_batches * (f + b))
    np.testing.assert_allclose(run.seconds - busy(run), (stages - 1) * (f + b))


@pytest.mark.parametrize(("stages", "chunks", "groups"), [(2, 2, 1), (4, 2, 3), (4, 4, 2)])
def test_uniform_interleaving_divides_the_bubble_by_its_chunks(stages, chunks, groups):
    """Bubble over compute is (P - 1) / (V M), Narayanan et al. (2021), section 2.2."""
    micro_batches = stages * groups
    f, b = 1.0 / chunks, 2.0 / chunks
    run = simulate(Schedule(stages, micro_batches, chunks), f, b)
    expected = (stages - 1) / (chunks * micro_batches)
    np.testing.assert_allclose((run.seconds - busy(run)) / busy(run), expected)


def test_sends_of_1f1b_are_waited_for():
    """2 stages, 1 micro-batch: forward, send, forward, backward, send, backward."""
    run = simulate(Schedule(2, 1), 1.0, 2.0, p2p_seconds=0.5)
    assert run.seconds == pytest.approx(1 + 0.5 + 1 + 2 + 0.5 + 2)
    # With more micro-batches every turn of the first stage holds a send after its forward, and
    # every turn of the second one after its backward: 4 turns of 3.5, and the way there and back.
    run = simulate(Schedule(2, 4), 1.0, 2.0, p2p_seconds=0.5)
    turns = 1 + 0.5 + 4 * (1 + 2 + 0.5) + 2
    assert run.seconds == pytest.approx(turns)


def test_one_stage_never_sends():
    assert simulate(Schedule(1, 3), 1.0, 2.0, p2p_seconds=9.0).seconds == pytest.approx(9.0)


def test_interleaving_sends_backwards_beside_the_next_pass():
    """By hand, 2 stages x 2 chunks, 2 micro-batches, f = b = 1, transfer 1. Stage 1 (2 warm-up
    forwards): F0.0 2-3, send to 4; F1.0 4-5 (its input left stage 0 at 3, came at 4), send to 6;
    then 1F1B from 6."""
    run = simulate(Schedule(2, 2, 2), 1.0, 1.0, p2p_seconds=1.0)
    second = [
        (e.work.forward, e.work.micro_batch, e.work.chunk, e.start)
        for e in run.events
        if e.stage == 1
    ]
    assert second[:2] == [(True, 0, 0, 2.0), (True, 1, 0, 4.0)]
    # Its first forward of chunk 1: stage 0 starts that chunk at 4, ends at 5, comes at 6.
    assert second[2] == (True, 0, 1, 6.0)
    # The last chunk of the last stage sends its forward nowhere: the backward follows at once, and
    # that one's send holds nothing: the next forward, whose input came at 8, starts at 8.
    assert second[3] == (False, 0, 1, 7.0)
    assert second[4] == (True, 1, 1, 8.0)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_1f1b_keeps_p_minus_stage_micro_batches(stages, micro_batches):
    run = simulate(Schedule(stages, micro_batches), 1.0, 1.0)
    expected = [min(stages - stage, micro_batches) for stage in range(stages)]
    assert [most_in_flight(run.schedule, p)[0] for p in range(stages)] == expected


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (4, 2), (4, 4), (8, 3)])
def test_interleaving_keeps_its_warmup_and_one(stages, chunks):
    """Stage 0 holds P V + P - 1 chunks at once where there are enough micro-batches, so 1 +
    (P - 1) / (P V) of 1F1B's activations (Korthikanti et al., 2022, section 4.2.3)."""
    schedule = Schedule(stages, 4 * stages, chunks)
    bytes_P = peak_activations(schedule, 1.0 / chunks, 0.0)
    assert bytes_P[0] * chunks == stages * chunks + stages - 1
    assert bytes_P[0] / stages == pytest.approx(1 + (stages - 1) / (stages * chunks))


def test_in_flight_counts_are_those_of_the_time_line():
    """Count passes of one chunk that have begun a forward and not ended their backward."""
    rng = np.random.default_rng(3)
    schedule = Schedule(4, 8, 2)
    shape = (4, 2, 8)
    run = simulate(schedule, rng.uniform(0.5, 2, shape), rng.uniform(0.5, 2, shape))
    for stage in range(4):
        for chunk in range(2):
            mine = [e for e in run.events if e.stage == stage and e.work.chunk == chunk]
            held = [
                sum(e.work.forward and e.start <= now.start for e in mine)
                - sum(not e.work.forward and e.end <= now.start for e in mine)
                for now in mine
            ]
            assert most_in_flight(schedule, stage)[chunk] == max(held)


def test_peak_activations_weigh_chunks_and_the_running_pass():
    """1F1B, 2 stages: stage 0 holds 2 micro-batches of 10 B and works with 7; stage 1 one of 20."""
    peaks = peak_activations(Schedule(2, 4), [[10.0], [20.0]], [[7.0], [3.0]])
    assert peaks.tolist() == [27.0, 23.0]


@given(schedules(), st.integers(0, 2**32 - 1))
def test_peak_activations_are_those_of_the_time_line(schedule, seed):
    """At each pass: all kept since a forward began whose backward has not ended, and its own."""
    rng = np.random.default_rng(seed)
    kept, working = rng.uniform(0, 9, (2, schedule.stages, schedule.chunks))
    run = simulate(schedule, 1.0, 2.0)
    for stage, peak in enumerate(peak_activations(schedule, kept, working)):
        mine = [e for e in run.events if e.stage == stage]
        held = [
            sum(kept[stage, e.work.chunk] for e in mine if e.work.forward and e.start <= now.start)
            - sum(
                kept[stage, e.work.chunk] for e in mine if not e.work.forward and e.end <= now.start
            )
            + working[stage, now.work.chunk]
            for now in mine
        ]
        assert peak == pytest.approx(max(held))


def test_a_slow_stage_paces_the_others():
    """With a stage of 3 times the time, M turns of it and one pass through the other stages."""
    forward, backward = np.ones((3, 1)), np.ones((3, 1))
    forward[1], backward[1] = 3.0, 3.0
    run = simulate(Schedule(3, 20), forward, backward)
    # To reach it 1, its 20 turns, and back through stage 0 at least 1.
    assert run.seconds >= 1 + 20 * 6 + 1
    assert run.seconds <= 1 + 20 * 6 + 1 + 2 * (1 + 1)


def test_one_hot_micro_batch_costs_once():
    """Skew as an array: a forward that takes 5 longer on every stage delays by at most 5 a stage,
    and on a single stage's critical path by exactly 5."""
    forward = np.ones((1, 1, 6))
    forward[0, 0, 2] += 5
    assert simulate(Schedule(1, 6), forward, 2.0).seconds == pytest.approx(6 * 3 + 5)
    forward = np.ones((4, 1, 6))
    plain = simulate(Schedule(4, 6), forward, 2.0).seconds
    forward[:, 0, 2] += 5
    assert plain + 5 <= simulate(Schedule(4, 6), forward, 2.0).seconds <= plain + 4 * 5


# Properties


@given(runs())
def test_no_stage_is_busier_than_the_step_is_long(case):
    schedule, forward, backward, transfer = case
    run = simulate(schedule, forward, backward, transfer)
    work_P = (forward + backward).sum(axis=(1, 2))
    np.testing.assert_allclose(busy(run), work_P)
    assert (run.seconds >= work_P - 1e-9).all()
    assert len(busy(run)) == schedule.stages
    assert (run.end_P <= run.seconds + 1e-9).all()


@given(runs())
def test_the_time_line_obeys_stages_and_transfers(case):
    """No two passes of a stage overlap, and none starts before its input has come."""
    schedule, forward, backward, transfer = case
    events = simulate(schedule, forward, backward, transfer).events
    assert len(events) == 2 * forward.size
    ends = {(e.work.forward, e.stage, e.work.chunk, e.work.micro_batch): e.end for e in events}
    for earlier, later in itertools.pairwise(events):
        assert earlier.stage != later.stage or earlier.end <= later.start + 1e-12
    for e in events:
        # Virtual stage c P + s: forwards go up by one, backwards down.
        here = e.work.chunk * schedule.stages + e.stage
        before = here - 1 if e.work.forward else here + 1
        if 0 <= before < schedule.stages * schedule.chunks:
            chunk, stage = divmod(before, schedule.stages)
            came = ends[(e.work.forward, stage, chunk, e.work.micro_batch)] + transfer
            assert e.start >= came - 1e-12


@given(runs(), st.data())
def test_no_step_gets_shorter_when_something_takes_longer(case, data):
    schedule, forward, backward, transfer = case
    before = simulate(schedule, forward, backward, transfer).seconds
    times = data.draw(st.sampled_from([forward, backward]))
    times[tuple(data.draw(st.integers(0, n - 1)) for n in times.shape)] += 1.5
    longer = simulate(schedule, forward, backward, transfer).seconds
    assert longer >= before - 1e-9
    assert simulate(schedule, forward, backward, transfer + 0.3).seconds >= longer - 1e-9


@given(runs(), st.floats(0.1, 10))
def test_time_has_no_unit(case, factor):
    schedule, forward, backward, transfer = case
    one = simulate(schedule, forward, backward, transfer).seconds
    other = simulate(schedule, factor * forward, factor * backward, factor * transfer).seconds
    assert other == pytest.approx(factor * one)


def test_the_last_backward_of_a_chunk():
    run = simulate(Schedule(2, 4, 2), 1.0, 2.0)
    for stage in range(2):
        for chunk in range(2):
            event = run.last_backward(stage, chunk)
            assert event.work.micro_batch == 3
            assert (event.work.forward, event.work.chunk) == (False, chunk)
    assert run.last_backward(0, 0).end == run.end_P[0]


# Overlap


@given(st.floats(0, 10), st.floats(0, 10), st.integers(1, 12))
def test_exposed_reduction_by_running_the_buckets(communication, window, buckets):
    """Bucket i can start when i / n of the backward is done and the links are free."""
    free = 0.0
    for i in range(1, buckets + 1):
        free = max(free, window * i / buckets) + communication / buckets
    got = exposed_communication(communication, window, buckets)
    assert got == pytest.approx(free - window, abs=1e-9)


def test_what_a_bubble_hides():
    assert exposed_communication(4.0, 10.0, 1) == 4.0  # one bucket starts when all is done
    assert exposed_communication(4.0, 10.0, 4) == 1.0  # the last bucket
    assert exposed_communication(4.0, 10.0, 4, idle=0.75) == 0.25
    assert exposed_communication(4.0, 10.0, 4, idle=2.0) == 0.0
    assert exposed_communication(0.0, 0.0, 1) == 0.0


# Refusals


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((0, 1), "stages = 0"),
        ((2, 0), "micro_batches = 0"),
        ((2, 4, 0), "chunks = 0"),
        ((1, 4, 2), "needs stages above 1"),
        ((4, 3, 2), "group = 4 must be from stages = 4 to micro_batches = 3"),
        ((4, 8, 2, 3), "group = 3 must be"),
        ((4, 10, 2), "last group of 2 of 4"),
        ((2, 4, 1, None, True), "extra_warmup needs interleaving"),
    ],
)
def test_a_schedule_that_megatron_refuses_is_refused_in_one_line(arguments, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        Schedule(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("forward", "backward", "transfer", "fault"),
    [
        (np.ones((3, 1)), 1.0, 0.0, r"forward_seconds has shape \(3, 1, 1\)"),
        (1.0, np.ones(2), 0.0, r"backward_seconds has shape \(2,\)"),
        (1.0, -1.0, 0.0, "backward_seconds has a value that is negative"),
        (np.nan, 1.0, 0.0, "not finite"),
        (1.0, 1.0, -1.0, "p2p_seconds = -1.0"),
    ],
)
def test_times_that_are_no_times_are_refused_in_one_line(forward, backward, transfer, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        simulate(Schedule(2, 4), forward, backward, transfer)
    assert "\n" not in str(caught.value)


def test_wrong_overlap_is_refused():
    with pytest.raises(ValueError, match="buckets 1 or more"):
        exposed_communication(1.0, 1.0, 0)
    with pytest.raises(ValueError, match="times must be 0 or more"):
        exposed_communication(1.0, -1.0, 1)
