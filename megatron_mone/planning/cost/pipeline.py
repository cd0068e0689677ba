"""Event simulation of one step of a pipeline: who works when, who waits, and what is kept.

Every stage runs its passes in Megatron's order, each as soon as the stage is free and the pass's
input has come. The order follows megatron/core/pipeline_parallel/schedules.py of megatron-core
0.19: `get_schedule_table`, `get_pp_rank_microbatches` and the main loops of
`forward_backward_pipelining_without_interleaving` and `..._with_interleaving`. They are not called
here, since importing them takes seconds and their warm-up counts want process groups; the tests
compare. What is modelled of the transfers, in megatron-core 0.19:
- without interleaving every send is waited for, so a stage is held for `p2p_seconds` after each
  pass whose result goes to another stage (`P2PCommunicator.send_forward_recv_backward` and such);
- with interleaving (`overlap_p2p_comm`, its default) only a backward's send in the 1F1B phase
  goes on beside the next pass; a forward's is waited for even there, since its output is freed
  (`deallocate_pipeline_outputs`, which Megatron's training loop sets).
A send does not wait for its receiver to be ready. Touches nothing.
Shapes: P stages, V chunks of a stage, M micro-batches.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Work(NamedTuple):
    """One pass of one micro-batch through one chunk.

    Attributes:
        forward: False for the backward.
        micro_batch, chunk: both from 0; chunk is Megatron's virtual stage of this rank.
        steady: in the 1F1B phase, neither warm-up nor cool-down.
    """

    forward: bool
    micro_batch: int
    chunk: int
    steady: bool


@dataclass(frozen=True)
class Schedule:
    """1F1B, or interleaved 1F1B where a stage has more than one chunk.

    Attributes:
        stages: P, pipeline-parallel size.
        micro_batches: M of one step.
        chunks: V, model chunks of a stage (virtual pipeline size).
        group: micro-batches that run through one chunk before the next one's turn
            (`microbatch_group_size_per_vp_stage`); Megatron's default is P. Unused if V is 1.
        extra_warmup: one more forward before the 1F1B phase, which
            `overlap_moe_expert_parallel_comm` asks for with interleaving.

    Raises:
        ValueError: sizes that Megatron refuses.
    """

    stages: int
    micro_batches: int
    chunks: int = 1
    group: int | None = None
    extra_warmup: bool = False

    def __post_init__(self) -> None:
        for name in ("stages", "micro_batches", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be 1 or more")
        if self.chunks == 1:
            if self.extra_warmup:
                raise ValueError("extra_warmup needs interleaving: set chunks above 1")
            return
        if self.stages == 1:
            raise ValueError(f"chunks = {self.chunks} needs stages above 1: set one of them")
        size = self.group_size
        if not self.stages <= size <= self.micro_batches:
            raise ValueError(
                f"group = {size} must be from stages = {self.stages} to micro_batches = "
                f"{self.micro_batches}: use more micro-batches or fewer stages"
            )
        rest = self.micro_batches % size
        if 0 < rest < self.stages:
            raise ValueError(
                f"micro_batches = {self.micro_batches} leaves a last group of {rest} of {size}, "
                f"fewer than stages = {self.stages}: use a multiple of {size}"
            )

    @property
    def group_size(self) -> int:
        """`group`, or its default."""
        return self.stages if self.group is None else self.group

    def table(self) -> list[tuple[int, int]]:
        """(micro-batch, chunk) of each forward in turn; a backward mirrors the chunk."""
        if self.chunks == 1:
            return [(m, 0) for m in range(self.micro_batches)]
        starts = range(0, self.micro_batches, self.group_size)
        return [
            (m, chunk)
            for start in starts
            for chunk in range(self.chunks)
            for m in range(start, min(start + self.group_size, self.micro_batches))
        ]

    def warmup(self, stage: int) -> int:
        """Forwards of a stage before its first backward, the one of 1F1B not counted."""
        after = self.stages - stage - 1
        if self.chunks == 1:
            return min(after, self.micro_batches)
        count = 2 * after + (self.chunks - 1) * self.group_size + self.extra_warmup
        return min(count, self.micro_batches * self.chunks)

    def order(self, stage: int) -> list[Work]:
        """All 2 M V passes of a stage, first to last."""
        table = self.table()
        warmup, total = self.warmup(stage), len(table)
        forwards = [Work(True, m, c, k >= warmup) for k, (m, c) in enumerate(table)]
        backwards = [
            Work(False, m, self.chunks - 1 - c, k < total - warmup)
            for k, (m, c) in enumerate(table)
        ]
        order = forwards[:warmup]
        for forward, backward in zip(forwards[warmup:], backwards, strict=False):
            order += [forward, backward]
        return order + backwards[total - warmup :]

    def in_flight(self, stage: int) -> list[list[int]]:
        """After each pass of `order`: of each chunk, the micro-batches that wait for a backward.

        A backward's own micro-batch has just left. Their order is fixed, so no times matter.
        """
        held, counts = [0] * self.chunks, []
        for work in self.order(stage):
            held[work.chunk] += 1 if work.forward else -1
            counts.append(held.copy())
        return counts


@dataclass(frozen=True)
class Event:
    """One pass on the time line, in seconds from the step's start; `end` leaves the send out."""

    stage: int
    work: Work
    start: float
    end: float


@dataclass(frozen=True)
class PipelineRun:
    """One simulated step.

    Attributes:
        schedule: whose step it is.
        seconds: from the first pass to the end of the last pass or send (makespan).
        end_P: when each stage's last pass ends.
        events: stage after stage, in order of time.
    """

    schedule: Schedule
    seconds: float
    end_P: NDArray[np.float64]
    events: list[Event]

    def last_backward(self, stage: int, chunk: int) -> Event:
        """A chunk's backward of its last micro-batch: from its start gradients can be reduced."""
        return [
            e
            for e in self.events
            if e.stage == stage and not e.work.forward and e.work.chunk == chunk
        ][-1]


def simulate(
    schedule: Schedule,
    forward_seconds: ArrayLike,
    backward_seconds: ArrayLike,
    p2p_seconds: float = 0.0,
) -> PipelineRun:
    """Run one step.

    Args:
        schedule: P, V, M and their order.
        forward_seconds: of one micro-batch, [P, V, M], or [P, V], [P, V, 1] or a number where
            they are alike.
        backward_seconds: likewise, recomputation included.
        p2p_seconds: of one transfer to the next or previous stage.

    Raises:
        ValueError: times of another shape, negative or not finite.
    """
    forward_PVM = _times("forward_seconds", forward_seconds, schedule)
    backward_PVM = _times("backward_seconds", backward_seconds, schedule)
    if not 0 <= p2p_seconds < np.inf:
        raise ValueError(f"p2p_seconds = {p2p_seconds} must be finite and 0 or more")
    stages = range(schedule.stages)
    orders = [_order(schedule, stage) for stage in stages]
    free, nexts = [0.0] * schedule.stages, [0] * schedule.stages
    arrived: dict[tuple[bool, int, int, int], float] = {}  # (forward, stage, chunk, micro-batch)
    events: list[list[Event]] = [[] for _ in stages]
    remaining = sum(map(len, orders))
    while remaining:
        before = remaining
        for stage in stages:
            while nexts[stage] < len(orders[stage]):
                work = orders[stage][nexts[stage]]
                ready = _ready(schedule, stage, work, arrived)
                if ready is None:
                    break
                times_PVM = forward_PVM if work.forward else backward_PVM
                start = max(free[stage], ready)
                end = start + float(times_PVM[stage, work.chunk, work.micro_batch])
                events[stage].append(Event(stage, work, start, end))
                free[stage] = end + p2p_seconds * _holds(schedule, stage, work)
                # Chunks of one stage follow each other only where P is 1, which has one chunk.
                arrived[(work.forward, stage, work.chunk, work.micro_batch)] = end + p2p_seconds
                nexts[stage] += 1
                remaining -= 1
        if remaining == before:
            raise AssertionError("the order of the passes has a cycle")
    end_P = np.array([of_stage[-1].end for of_stage in events])
    seconds = float(max(end_P.max(), max(free)))
    return PipelineRun(schedule, seconds, end_P, [e for of_stage in events for e in of_stage])


def _times(name: str, values: ArrayLike, schedule: Schedule) -> NDArray[np.float64]:
    shape = (schedule.stages, schedule.chunks, schedule.micro_batches)
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim not in (0, 3) or any(
        have not in (1, want) for have, want in zip(array.shape, shape, strict=False)
    ):
        raise ValueError(
            f"{name} has shape {array.shape}: give a number, [P, V] or [P, V, M], "
            f"here {list(shape)}"
        )
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"{name} has a value that is negative or not finite: give seconds")
    return np.broadcast_to(array, shape)


def _source(schedule: Schedule, stage: int, work: Work) -> tuple[int, int] | None:
    """(stage, chunk) whose pass gives this one its input from outside; None where none does."""
    last = schedule.stages - 1
    if work.forward:
        if stage > 0:
            return stage - 1, work.chunk
        return (last, work.chunk - 1) if work.chunk > 0 else None
    if stage < last:
        return stage + 1, work.chunk
    return (0, work.chunk + 1) if work.chunk < schedule.chunks - 1 else None


def _ready(
    schedule: Schedule, stage: int, work: Work, arrived: dict[tuple[bool, int, int, int], float]
) -> float | None:
    """When a pass's input is there; None while its sender has not run."""
    source = _source(schedule, stage, work)
    if source is None:
        return 0.0
    return arrived.get((work.forward, *source, work.micro_batch))


def _holds(schedule: Schedule, stage: int, work: Work) -> bool:
    """Whether the stage waits for the send of a pass's result; False also where there is none."""
    if work.forward:
        ends = stage == schedule.stages - 1 and work.chunk == schedule.chunks - 1
    else:
        ends = stage == 0 and work.chunk == 0
    hidden = schedule.chunks > 1 and work.steady and not work.forward
    return not ends and not hidden


@lru_cache(maxsize=128)  # a fit and a search ask for the same stages again
def _order(schedule: Schedule, stage: int) -> list[Work]:
    return schedule.order(stage)


@lru_cache(maxsize=128)
def _held(schedule: Schedule, stage: int) -> NDArray[np.int64]:
    """[2 M V, V] of `Schedule.in_flight`."""
    return np.array(schedule.in_flight(stage))


def peak_activations(
    schedule: Schedule, kept_PV: ArrayLike, working_PV: ArrayLike
) -> NDArray[np.float64]:
    """[P] the most bytes of activations that each stage holds at once.

    Args:
        schedule: which micro-batches are in flight together.
        kept_PV: bytes a micro-batch keeps in a chunk from its forward to its backward.
        working_PV: bytes more while a pass of that chunk runs.
    """
    shape = (schedule.stages, schedule.chunks)
    kept = np.broadcast_to(np.asarray(kept_PV, dtype=np.float64), shape)
    working = np.broadcast_to(np.asarray(working_PV, dtype=np.float64), shape)
    peaks = []
    for stage in range(schedule.stages):
        after = _held(schedule, stage) @ kept[stage]
        order = _order(schedule, stage)
        # During a forward its micro-batch comes to be kept; during a backward it still is.
        during = [
            held + working[stage, work.chunk] + (0.0 if work.forward else kept[stage, work.chunk])
            for held, work in zip(after, order, strict=True)
        ]
        peaks.append(max(during))
    return np.array(peaks)


def exposed_communication(
    communication: float, window: float, buckets: int, idle: float = 0.0
) -> float:
    """Seconds that communication in equal buckets adds to the compute it overlaps.

    Megatron's `overlap_grad_reduce`: a bucket is reduced once its share of the last backward is
    done, buckets follow each other, and the last starts when the backward has ended. The mirror
    image holds for `overlap_param_gather`: the forward waits for its first bucket.

    Args:
        communication: seconds of all buckets together, alone on the links.
        window: seconds of the compute to hide in (the last micro-batch's backward, or the first
            one's forward).
        buckets: into which both are divided evenly.
        idle: seconds the stage waits anyway before what needs the result (its pipeline bubble).

    Returns:
        max(0, c - w (1 - 1 / buckets), c / buckets if any, less idle): 1 bucket hides nothing in
        the window.

    Raises:
        ValueError: fewer than 1 bucket or a negative time.
    """
    if buckets < 1 or min(communication, window, idle) < 0:
        raise ValueError(
            f"communication = {communication}, window = {window}, idle = {idle}, buckets = "
            f"{buckets}: times must be 0 or more and buckets 1 or more"
        )
    left = max(communication - window * (1 - 1 / buckets), communication / buckets)
    return max(0.0, left - idle)
