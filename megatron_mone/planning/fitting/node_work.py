"""What to time of a job on its nodes: its operators and collectives, the most expensive first.

Taken from its traces, so that exactly those shapes are timed that the planner prices; prices before
anything is timed say in which order. Of a group of the layout two more sizes of each kind are
timed, to price what another layout sends. May touch: the tracer's processes and cache.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_mone.planning.cost.collectives import OPERATIONS
from megatron_mone.planning.cost.measured_times import link_key, operator_key
from megatron_mone.planning.cost.rank_cost import collective_seconds, op_seconds
from megatron_mone.planning.fitting.node_times import (
    CalibrationJob,
    Link,
    LinkWork,
    OperatorWork,
    Work,
)
from megatron_mone.planning.fitting.small_jobs import is_kernel, operator_of, small_jobs
from megatron_mone.planning.job import short_layout
from megatron_mone.planning.planner import Planned, Planner
from megatron_mone.planning.tracing.trace import Op

SIZES = (2**12, 2**22)
"""Bytes at which every kind of collective of a group is timed beside the sizes of the trace."""
LEAST_SHARE = 1e-3
"""Of the price of all operators: cheaper ones are timed after those of the small jobs, whose steps
are set against them."""


def work_of(planner: Planner, planned: Planned, gpus: int, here: int) -> Work:
    """What is timed of a planned job.

    Args:
        planner: that planned it.
        planned: the job.
        gpus: W.
        here: ranks that are to time it.
    """
    traces, facts = planned.traced.traces.values(), planned.traced.facts
    prices: dict[Any, float] = defaultdict(float)
    first: dict[Any, Op] = {}
    for trace in traces:
        for op in trace.ops:
            key = operator_key(op)
            first.setdefault(key, op)
            often = op.count * (1 if op.of_step else facts.micro_batches)
            if op.of_device:
                prices[key] += often * op_seconds(op, planner.cluster, planner.efficiency)
    found = {key: price for key, price in prices.items() if price > 0}
    small, launch, notes = small_jobs(planner, planned.job, gpus, here)
    values = planned.job.values()
    shares = {key: price / sum(found.values()) for key, price in found.items()}
    ordered = sorted(shares, key=lambda key: -shares[key])
    dear = [key for key in ordered if shares[key] >= LEAST_SHARE]
    of_small = {
        operator_key(one.op()): one.op()
        for job in (small, launch)
        for one in (job.operators if job else ())
        if is_kernel(one.op())
    }
    operators = [
        OperatorWork(operator=operator_of({**of_small, **first}[key]), share=shares.get(key, 0.0))
        for key in dict.fromkeys((*dear, *of_small, *ordered))
    ]
    return Work(
        job=CalibrationJob(
            model=planned.job.name, gpus=gpus, layout=short_layout(values),
            flags=planner.flags(planned.job), cluster=planner.cluster.name,
            device=planner.cluster.device.name, neuron_block=values.get("mone_neuron_block") or 1,
            kept_of=facts.moe_ffn_hidden_size if is_mone(values) else 0,
        ),
        ranks=here, operators=operators, links=list(_links(planner, planned)), small=small,
        launch=launch, notes=notes,
    )  # fmt: skip


def is_mone(values: Mapping[str, Any]) -> bool:
    """Whether a job's model has MoNE layers."""
    return any(name.startswith("mone_neuron") for name in values)


def _links(planner: Planner, planned: Planned) -> Iterator[LinkWork]:
    facts = planned.traced.facts
    prices: dict[tuple[tuple[str, int, int], int], float] = defaultdict(float)
    groups: dict[tuple[str, int, int], str] = {}
    for trace in planned.traced.traces.values():
        for one in trace.collectives:
            if one.kind not in OPERATIONS or one.ranks < 2:
                continue
            key = link_key(one)
            groups.setdefault(key, one.group)
            often = one.count * (facts.micro_batches if one.of_micro_batch else 1)
            seconds = collective_seconds(one, facts, planner.cluster, planner.efficiency)
            prices[key, one.bytes] += often * seconds
    total = sum(prices.values())
    sized = sorted(prices.items(), key=lambda pair: -pair[1])
    for (key, size), price in sized:
        yield LinkWork(link=_link(key, groups[key], size), share=price / total if total else 0.0)
    for key, group in groups.items():
        for size in SIZES:
            if (key, size) not in prices:
                yield LinkWork(link=_link(key, group, size), share=0.0)


def _link(key: tuple[str, int, int], group: str, size: int) -> Link:
    kind, ranks, stride = key
    return Link(kind=kind, group=group, ranks=ranks, stride=stride, bytes=size)
