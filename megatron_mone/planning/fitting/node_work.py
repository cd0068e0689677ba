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
    Operator,
    OperatorWork,
    SmallJob,
    Work,
)
from megatron_mone.planning.job import SHORT, JobSpec, short_layout
from megatron_mone.planning.planner import Planned, Planner
from megatron_mone.planning.tracing.gpu_job import is_gpu_job
from megatron_mone.planning.tracing.trace import Op

SIZES = (2**12, 2**22)
"""Bytes at which every kind of collective of a group is timed beside the sizes of the trace."""
SMALL_TOKENS = 32
MOST_MICRO_BATCHES = 4
"""Of a step of the small job on CPU ranks: only the first finds what the optimizer left cold."""
LEAST_SHARE = 1e-3
"""Of the price of all operators: cheaper ones are timed after those of the small job, which the
launch cost needs."""
_DROPPED = dict.fromkeys(
    ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
     "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers",
     "decoder_last_pipeline_num_layers", "sequence_parallel", "tp_comm_overlap",
     "overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "overlap_grad_reduce",
     "overlap_param_gather", "moe_layer_freq", "mtp_num_layers",
     "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
     "microbatch_group_size_per_virtual_pipeline_stage",
     "num_distributed_optimizer_instances", "moe_router_num_groups", "moe_router_group_topk",
     "hybrid_context_parallel", "recompute_granularity", "recompute_modules", "recompute_method",
     "recompute_num_layers", "train_samples", "cuda_graph_impl")
)  # fmt: skip


def work_of(planner: Planner, planned: Planned, gpus: int) -> Work:
    """What is timed of a planned job.

    Args:
        planner: that planned it.
        planned: the job.
        gpus: W.
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
    small, notes = _small_job(planner, planned.job, facts.micro_batches)
    values = planned.job.values()
    shares = {key: price / sum(found.values()) for key, price in found.items()}
    ordered = sorted(shares, key=lambda key: -shares[key])
    dear = [key for key in ordered if shares[key] >= LEAST_SHARE]
    of_small = {
        operator_key(one.op()): one.op()
        for one in (small.operators if small else ())
        if _is_kernel(one.op())
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
        operators=operators, links=list(_links(planner, planned)), small=small, notes=notes,
    )  # fmt: skip


def is_mone(values: Mapping[str, Any]) -> bool:
    """Whether a job's model has MoNE layers."""
    return any(name.startswith("mone_neuron") for name in values)


def operator_of(op: Op) -> Operator:
    """As the files have it."""
    return Operator(
        name=op.name, inputs=list(map(list, op.inputs)), outputs=list(map(list, op.outputs)),
        dtype=op.dtype, bytes_read=op.bytes_read, bytes_written=op.bytes_written, flops=op.flops,
        phase=op.phase,
    )  # fmt: skip


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


def _small_job(
    planner: Planner, job: JobSpec, micro_batches: int
) -> tuple[SmallJob | None, list[str]]:
    """One layer on one rank. On GPUs of few tokens: what is left of its step is the host's."""
    values = job.values()
    ep = values.get(SHORT["ep"]) or 1
    experts = values.get("num_experts")
    one = {SHORT[name]: 1 for name in ("tp", "cp", "pp", "ep", "etp", "mbs", "gbs")}
    changes: dict[str, Any] = {**_DROPPED, **one, "num_layers": 1}
    if is_gpu_job(planner.flags(job)):
        changes["seq_length"] = SMALL_TOKENS
        micro_batches = 1
    else:
        micro_batches = min(micro_batches, MOST_MICRO_BATCHES)
        changes[SHORT["mbs"]] = values.get(SHORT["mbs"]) or 1
        changes[SHORT["gbs"]] = changes[SHORT["mbs"]] * micro_batches
    if experts:
        changes["num_experts"] = max(experts // ep, values.get("moe_router_topk") or 2)
    small = job.with_layout({k: v for k, v in changes.items() if v is not None or k in values})
    try:
        flags = planner.flags(small)
        traced = planner.tracer.trace(flags, 1)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        return None, [f"launch: one layer of the model on one rank is not traced: {reason}"]
    counts: dict[Any, int] = defaultdict(int)
    first: dict[Any, Op] = {}
    for trace in traced.traces.values():
        for op in trace.ops:
            if op.of_device:
                key = (operator_key(op), op.phase, op.of_step)
                first.setdefault(key, op)
                counts[key] += op.count * (1 if op.of_step else micro_batches)
    launches = (n for key, n in counts.items() if _is_kernel(first[key]) and not key[-1])
    return SmallJob(
        flags=flags, launches=sum(launches),
        operators=[operator_of(op) for op in first.values()],
        counts=list(counts.values()),
    ), []  # fmt: skip


def _is_kernel(op: Op) -> bool:
    """Whether the device does something: nodes of autograd and waits are the host's alone."""
    return bool(op.flops or op.bytes_read or op.bytes_written)
