"""PhaseClock on a clock of its own: what is noted, to which step and pass it belongs."""

import pytest

from megatron_mone.common import phases
from megatron_mone.profiling.clock import Call, HostStamps, PhaseClock

REDUCED = Call("all_reduce", "dp", 100, phases.GRAD_REDUCE)


class CountedStamps(HostStamps):
    """Moments are set by the test, in ms."""

    def __init__(self):
        self.at = 0
        self.waited = []

    def now(self):
        return self.at

    def ms(self, start, end):
        return float(end - start)

    def wait(self, moment):
        self.waited.append(moment)


@pytest.fixture
def stamps():
    return CountedStamps()


@pytest.fixture
def clock(stamps):
    return PhaseClock(stamps)


def test_phases_add_up_to_the_step(clock, stamps):
    clock.begin()
    for at, phase in ((1, phases.ATTENTION), (4, phases.ROUTER), (9, phases.ATTENTION)):
        stamps.at = at
        clock.enter_forward(phase)
    stamps.at = 16
    clock.end()
    (step,) = clock.take()
    assert step.phases == {
        (phases.OTHER, "forward"): 1.0,
        (phases.ATTENTION, "forward"): 3.0 + 7.0,
        (phases.ROUTER, "forward"): 5.0,
    }
    assert step.ms == 16.0 == sum(step.phases.values())


def test_a_forward_inside_a_backward_is_a_recompute(clock, stamps):
    clock.begin()
    clock.enter_backward(phases.LOSS)
    stamps.at = 2
    clock.enter_forward(phases.ROUTER)
    clock.enter(phases.SELECTION)
    stamps.at = 5
    clock.enter_backward(phases.ROUTER)
    stamps.at = 6
    clock.end()
    (step,) = clock.take()
    assert step.phases[phases.SELECTION, "recompute"] == 3.0
    assert step.phases[phases.ROUTER, "recompute"] == 0.0
    assert step.phases[phases.ROUTER, "backward"] == 1.0
    assert step.phases[phases.LOSS, "backward"] == 2.0


def test_nothing_is_noted_outside_a_step(clock, stamps):
    assert clock.switch(phases.ROUTER, "forward") is None
    clock.note_communication(REDUCED, 1, 8, None, None)
    clock.begin()
    stamps.at = 1
    clock.end()
    (step,) = clock.take()
    assert step.phases == {(phases.OTHER, "forward"): 1.0}
    assert step.communication == {}
    assert clock.take() == []


def test_an_abandoned_step_leaves_nothing(clock, stamps):
    clock.begin()
    clock.enter_forward(phases.ROUTER)
    clock.abandon()
    assert not clock.running
    assert clock.take() == []
    clock.begin()
    assert (clock.phase, clock.pass_) == (phases.OTHER, "forward")


def test_a_step_is_read_one_step_later(clock, stamps):
    """So that the host waits for a device that has long been done."""
    for end in (10, 30):
        clock.begin()
        stamps.at = end
        clock.end()
    assert stamps.waited == [10]
    assert [step.ms for step in clock.take()] == [10.0, 20.0]
    assert stamps.waited == [10, 30]


def test_communication_adds_up_by_kind(clock):
    clock.begin()
    clock.note_communication(REDUCED, 1, 100, 0, 3)
    clock.note_communication(REDUCED, 0, 0, 5, 6)  # waiting for it
    clock.note_communication(REDUCED._replace(bytes=4), 1, 8, 6, 8)
    clock.note_communication(Call("all_to_all", "ep", 14, phases.PERMUTE), 1, 7, 6, 8)
    clock.end()
    (step,) = clock.take()
    reduced = step.communication["all_reduce dp"]
    assert (reduced.calls, reduced.bytes, reduced.ms) == (2, 108, 6.0)
    assert step.communication["all_to_all ep"].bytes == 7
    alike = {call: (times.calls, times.ms) for call, times in step.calls.items()}
    assert alike[REDUCED] == (1, 4.0)
    assert alike[REDUCED._replace(bytes=4)] == (1, 2.0)
    assert {call.group for call in alike} == {"dp", "ep"}


def test_listeners_hear_phases_of_steps_only(clock):
    heard = []
    clock.on_switch = heard.append
    clock.enter_forward(phases.ROUTER)
    clock.begin()
    phases.listen(clock.enter)
    phases.enter(phases.SELECTION)
    phases.listen(None)
    phases.enter(phases.GATE_GEMM)
    assert heard == [phases.OTHER, phases.SELECTION]


def test_host_spans_cover_the_step(clock, stamps):
    clock.begin()
    stamps.at = 4
    clock.enter_forward(phases.ROUTER)
    stamps.at = 9
    clock.end()
    assert clock.host_spans() == [(0, 4, "other", "forward"), (4, 9, "router", "forward")]
