"""PhaseClock: which phase a training step is in, and how long each lasted.

At any moment of a step there is one current phase, so the times of the phases add up to the step.
On a CPU a moment is a reading of the monotonic clock; on CUDA it is an event on one stream, read
one step later, so that measuring never makes the host wait. May touch: torch.cuda events and
NVTX ranges; nothing of Megatron.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from megatron_mone.common.phases import BACKWARD, FORWARD, OTHER, RECOMPUTE


class Stamps(Protocol):
    """A source of moments."""

    def now(self) -> Any:
        """This moment."""

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two moments; both must have passed."""

    def wait(self, moment: Any) -> None:
        """Return when `moment` has passed."""


class HostStamps:
    """The monotonic clock of the host."""

    def now(self) -> int:
        """Nanoseconds."""
        return time.perf_counter_ns()

    def ms(self, start: int, end: int) -> float:
        """See Stamps."""
        return (end - start) / 1e6

    def wait(self, moment: int) -> None:
        """A moment of the host has always passed."""


class CudaStamps:
    """Events on the CUDA stream that is current when this is made, that of a step's computing: what
    others do beside it takes the time that it waits for them. Not run on a GPU yet."""

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()

    def now(self) -> torch.cuda.Event:
        """An event recorded here."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See Stamps."""
        return start.elapsed_time(end)

    def wait(self, moment: torch.cuda.Event) -> None:
        """Block the host until the device has reached the event."""
        moment.synchronize()


class Call(NamedTuple):
    """Collectives that a step makes alike.

    Attributes:
        operation, group: as communication.py names them.
        bytes: that this rank puts into one.
        phase: in which they are called.
    """

    operation: str
    group: str
    bytes: int
    phase: str


@dataclass
class CommunicationTimes:
    """The collectives of one kind in one step.

    Attributes:
        calls: how many were launched.
        bytes: what this rank sends in them.
        ms: from launch to return, and in waiting for them.
    """

    calls: int = 0
    bytes: int = 0
    ms: float = 0.0


@dataclass
class StepTimes:
    """One measured step.

    Attributes:
        ms: its length.
        phases: (phase, pass) -> ms; adds up to `ms`.
        communication: "op group" -> its collectives.
        calls: the same by size and phase.
    """

    ms: float
    phases: dict[tuple[str, str], float]
    communication: dict[str, CommunicationTimes]
    calls: dict[Call, CommunicationTimes] = field(default_factory=dict)


@dataclass
class _Step:
    """What was noted in a step: moments, to be read later."""

    switches: list[tuple[Any, str, str]] = field(default_factory=list)
    communication: list[tuple[Call, int, int, Any, Any]] = field(default_factory=list)
    end: Any = None


class PhaseClock:
    """Notes when phases begin, step by step.

    Args:
        stamps: HostStamps or CudaStamps.
        nvtx: also open an NVTX range for each phase.

    Attributes:
        phase, pass_: the current ones.
        running: whether a step is under way.
        on_switch: also told of every phase that begins in a step.
    """

    def __init__(self, stamps: Stamps, *, nvtx: bool = False) -> None:
        self.phase, self.pass_ = OTHER, FORWARD
        self.running = False
        self.on_switch: Callable[[str], None] | None = None
        self._stamps = stamps
        self._nvtx = nvtx
        self._range: int | None = None
        self._step = _Step()
        self._unread: list[_Step] = []
        self._read: list[StepTimes] = []

    def begin(self) -> None:
        """A step begins."""
        self._step = _Step()
        self.running = True
        self.switch(OTHER, FORWARD)

    def end(self) -> None:
        """The step ends; the one before it is read."""
        self._step.end = self._stamps.now()
        self._close_range()
        self.running = False
        self._read_all()
        self._unread.append(self._step)

    def abandon(self) -> None:
        """Forget the step under way: it did not end, or was not to be timed."""
        self._close_range()
        self.running = False

    def switch(self, phase: str, pass_: str) -> Any:
        """The current phase ends and `phase` begins; returns the moment, None outside a step."""
        self.phase, self.pass_ = phase, pass_
        if not self.running:
            return None
        moment = self._stamps.now()
        self._step.switches.append((moment, phase, pass_))
        if self.on_switch is not None:
            self.on_switch(phase)
        if self._nvtx:
            self._close_range()
            self._range = torch.cuda.nvtx.range_start(f"{phase}, {pass_}")
        return moment

    def enter(self, phase: str) -> None:
        """`phase` begins in the pass under way: what kernels say by `phases.enter`."""
        self.switch(phase, self.pass_)

    def enter_forward(self, phase: str) -> None:
        """The forward of `phase` begins; inside a backward it is a recompute."""
        self.switch(phase, FORWARD if self.pass_ == FORWARD else RECOMPUTE)

    def enter_backward(self, phase: str) -> None:
        """The backward of `phase` begins."""
        self.switch(phase, BACKWARD)

    def note_communication(self, call: Call, calls: int, size: int, start: Any, end: Any) -> None:
        """So many of `call`, which sent `size` bytes, took from one moment to another."""
        if self.running and start is not None:
            self._step.communication.append((call, calls, size, start, end))

    def take(self) -> list[StepTimes]:
        """The steps measured since the last call, in order; waits for the last to end."""
        self._read_all()
        taken, self._read = self._read, []
        return taken

    def host_spans(self) -> list[tuple[int, int, str, str]]:
        """(start ns, end ns, phase, pass) of the last step, of a clock with HostStamps."""
        moments = [moment for moment, _, _ in self._step.switches] + [self._step.end]
        return [
            (start, end, phase, pass_)
            for (start, phase, pass_), end in zip(self._step.switches, moments[1:], strict=True)
        ]

    def _close_range(self) -> None:
        if self._range is not None:
            torch.cuda.nvtx.range_end(self._range)
            self._range = None

    def _read_all(self) -> None:
        for step in self._unread:
            self._stamps.wait(step.end)
            self._read.append(self._times(step))
        self._unread = []

    def _times(self, step: _Step) -> StepTimes:
        phases: dict[tuple[str, str], float] = defaultdict(float)
        ends = [moment for moment, _, _ in step.switches[1:]] + [step.end]
        for (start, phase, pass_), end in zip(step.switches, ends, strict=True):
            phases[phase, pass_] += self._stamps.ms(start, end)
        communication: dict[str, CommunicationTimes] = defaultdict(CommunicationTimes)
        alike: dict[Call, CommunicationTimes] = defaultdict(CommunicationTimes)
        for call, calls, size, start, end in step.communication:
            ms = self._stamps.ms(start, end)
            for times in (communication[f"{call.operation} {call.group}"], alike[call]):
                times.calls += calls
                times.bytes += size
                times.ms += ms
        return StepTimes(sum(phases.values()), dict(phases), dict(communication), dict(alike))


def phase_clock() -> PhaseClock:
    """This machine's clock: CUDA events and NVTX ranges with a GPU, the host's clock without."""
    on_cuda = torch.cuda.is_available()
    return PhaseClock(CudaStamps() if on_cuda else HostStamps(), nvtx=on_cuda)
