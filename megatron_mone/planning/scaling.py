"""The same layout on more or fewer devices: replicas are added, every one with its own samples.

What a replica computes stays; shards of the distributed optimizer shrink, and collectives over
replicas grow. So no trace is made anew: sizes are scaled, to within the padding of shards.
May touch: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from megatron_mone.common.phases import OPTIMIZER
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import Collective, Op, Trace

OVER_REPLICAS = ("dp", "dp-cp", "edp", "intra_distributed_optimizer_instance_group", "world")
_WHOLE = ("aten.zero_",)  # of the optimizer's operators: all gradients, not those this rank owns


def scaled_facts(facts: JobFacts, gpus: int) -> JobFacts | None:
    """The facts on other devices, tokens of a device alike; None where the layout does not fit.

    Args:
        facts: of a job.
        gpus: W of the other.
    """
    factor = Fraction(gpus, facts.world_size)
    counts = [factor * count for count in (facts.dp, facts.edp, facts.global_batch_size)]
    if any(count.denominator > 1 or count < 1 for count in counts):
        return None
    dp, edp, batch = map(int, counts)
    flops = ("model_flops_per_step", "executed_flops_per_step", "active_flops_per_step")
    return replace(
        facts, world_size=gpus, dp=dp, edp=edp, global_batch_size=batch,
        **{name: getattr(facts, name) * float(factor) for name in flops},
    )  # fmt: skip


def scaled_traces[Place](
    traces: Mapping[Place, Trace], facts: JobFacts, gpus: int
) -> dict[Place, Trace]:
    """Traces of the job that `scaled_facts` describes.

    Args:
        traces: of the job of `facts`.
        facts: of that job.
        gpus: W of the other.
    """
    factor = Fraction(gpus, facts.world_size)
    shard = 1 / factor if facts.distributed_optimizer else Fraction(1)
    known: dict[int, tuple[Op, ...]] = {}  # equal stages stay the same object: predict() knows them

    def ops(trace: Trace) -> tuple[Op, ...]:
        if id(trace.ops) not in known:
            known[id(trace.ops)] = tuple(_scaled_op(op, shard) for op in trace.ops)
        return known[id(trace.ops)]

    return {
        place: replace(
            trace,
            world_size=gpus,
            ops=ops(trace),
            collectives=tuple(_scaled(one, factor, shard) for one in trace.collectives),
            memory=replace(
                trace.memory,
                optimizer=round(trace.memory.optimizer * shard),
                expert_optimizer=round(trace.memory.expert_optimizer * shard),
            ),
        )
        for place, trace in traces.items()
    }


def _scaled(one: Collective, factor: Fraction, shard: Fraction) -> Collective:
    if one.group not in OVER_REPLICAS or one.of_micro_batch:
        return one
    ranks = max(1, round(one.ranks * factor))
    size = round(one.bytes * shard) if one.kind == "all_gather" else one.bytes
    return replace(one, ranks=ranks, bytes=size)


def _scaled_op(op: Op, shard: Fraction) -> Op:
    if op.phase != OPTIMIZER or op.name in _WHOLE:
        return op
    moved = round(op.bytes_read * shard), round(op.bytes_written * shard)
    return replace(op, bytes_read=moved[0], bytes_written=moved[1])
