"""The order in which each pipeline stage runs its micro-batches, as Megatron's schedules do.

Follows megatron/core/pipeline_parallel/schedules.py of megatron-core 0.19: `get_schedule_table`,
`get_pp_rank_microbatches` and the main loops of `forward_backward_pipelining_without_interleaving`
and `..._with_interleaving`. They are not called here, since importing them takes seconds and their
warm-up counts want process groups; the tests compare. Touches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


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
