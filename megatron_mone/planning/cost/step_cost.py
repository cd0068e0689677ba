"""Seconds of what a rank does once a step: reducing gradients, the optimizer, gathering parameters.

May touch: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_mone.planning.cost.chunk_cost import collective_seconds, op_seconds
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.op_classes import operation
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import Collective, Trace

REDUCTIONS = ("reduce_scatter", "all_reduce")
_SMALL = 4096  # bytes; norms, flags and losses, which are agreed on once and not for each chunk


@dataclass(frozen=True)
class StepCost:
    """Of one rank and one step, in seconds.

    Attributes:
        reduce: of gradients over replicas, alone on the links.
        reduce_buckets: collectives it consists of.
        gather: of parameters after the update.
        gather_buckets: likewise.
        optimizer: gradients scaled and checked, their norm, the update, copies of parameters,
            gradients zeroed.
        agree: small collectives: norms, losses, faults.
    """

    reduce: float
    reduce_buckets: int
    gather: float
    gather_buckets: int
    optimizer: float
    agree: float


def step_cost(
    chunks: Sequence[Trace], facts: JobFacts, cluster: Cluster, efficiency: Efficiency
) -> StepCost:
    """Cost of one rank's step outside its passes.

    Args:
        chunks: traces of the rank's chunks; the first is chunk 0.
        facts: of the job.
        cluster, efficiency: where, and how near to its peaks.
    """
    reductions = [c for c in _of_step(chunks) if c.kind in REDUCTIONS]
    gathers = [c for c in _of_step(chunks) if c.kind == "all_gather"]
    small = [c for c in chunks[0].collectives if not c.of_micro_batch and c.bytes <= _SMALL]
    update = sum(
        op.count * op_seconds(operation(op), cluster, efficiency)
        for trace in chunks
        for op in trace.ops
        if op.of_step
    )
    return StepCost(
        _seconds(reductions, facts, cluster),
        sum(c.count for c in reductions),
        _seconds(gathers, facts, cluster),
        sum(c.count for c in gathers),
        update,
        _seconds(small, facts, cluster),
    )


def _of_step(chunks: Iterable[Trace]) -> list[Collective]:
    return [
        c
        for trace in chunks
        for c in trace.collectives
        if not c.of_micro_batch and c.bytes > _SMALL
    ]


def _seconds(collectives: Iterable[Collective], facts: JobFacts, cluster: Cluster) -> float:
    return sum(one.count * collective_seconds(one, facts, cluster) for one in collectives)
