"""Seconds of what one rank does, from its traces: one micro-batch's passes through one pipeline
chunk, and what is once a step: reducing gradients, the optimizer, gathering parameters.

What goes on beside a pass's compute, as megatron-core 0.19 does it:
- tensor parallel, backward: a column-parallel linear gathers its input beside its dgrad GEMM and
  scatters dgrad beside its wgrad GEMM, so that of a block's three collectives (a row-parallel
  linear must gather first) two are hidden; without sequence parallelism every all-reduce is. With
  `tp_comm_overlap` forward and backward alike, but for the first of the tp pieces of each.
- context parallel: a ring step goes on beside attention on the piece before, the first excepted.
- expert parallel: nothing, unless `overlap_moe_expert_parallel_comm`; or the dispatch's backward,
  with `overlap_dispatch_backward_with_experts_wgrad` beside the weight gradients of its experts.
And as DeepSpeed 0.19 does, of what ZeRO 2 and 3 send over replicas in a pass:
- with `overlap_comm` all goes on beside all of the pass's compute, but for one bucket: the first of
  parameters gathered, the last of gradients reduced; without it nothing does.
As Megatron FSDP does, of what optim_grads and optim_grads_params send in a pass: gathers are
launched ahead by half of --suggested-communication-unit-size, 500 million parameters or more, and
reductions are waited for when twice that is under way, so that it is as with `overlap_comm`.
And activations to the host in a forward pass, back in a backward one, as Megatron's activation
offloading copies them on streams of their own: beside the whole pass, so that a pass takes as long
as its copies where those take longer.
A pass takes as long as the device's kernels and communication or as the host that launches them and
makes and runs their nodes of autograd, whichever is more, and what the host's waits for the device
cost both; in a CUDA graph kernels and nodes cost the host the graph's one launch.
May touch: nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_mone.common.phases import ATTENTION, BACKWARD, COMBINE, DISPATCH, FORWARD, MAMBA
from megatron_mone.planning.cost.collectives import (
    OPERATIONS,
    Placement,
    collective_cost,
    expected_parts,
    hierarchical_dispatch_cost,
    place_stride,
)
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.host_cost import (
    NO_WORK,
    HostWork,
    host_of,
    host_work,
    update_seconds,
)
from megatron_mone.planning.cost.roofline import WEIGHT_GRADIENTS, operation
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import (
    DEVICE_WAIT,
    FUNCTION_NODE,
    NODE,
    Collective,
    Op,
    Trace,
)

HIERARCHICAL = ("dispatch", "combine")
# What one matrix multiplication of a block can hide of its three tensor-parallel collectives.
_REPLICAS = ("dp-cp", "edp", "world")
_OF_INSTANCES = ("data_parallel_group", "distributed_optimizer_instance")
"""In names of groups of replicas where the optimizer has several instances."""
_ONCE_A_LAYER = ("fused.attention", "fused.attention_backward")
_HIDDEN_IN_BACKWARD = {"all_gather": 0.5, "reduce_scatter": 1.0, "all_reduce": 1.0}


@dataclass(frozen=True)
class PassCost:
    """One pass, forward or backward (recomputation included), in seconds.

    Attributes:
        compute: of kernels, of the host's waits for them, and what overlap adds to them.
        by_phase: compute -> phase, without overlap's part.
        expert: expert-parallel communication, dispatch and combine, not hidden.
        expert_compute: of `compute`, what could hide another pass's expert communication: all.
        exposed: communication of other groups that is not hidden, by group.
        hidden: that is.
        host: that the host takes, beside all of that.
        copies: what crosses to the host or from it; of that what the rest does not hide is in
            `exposed`, under "host".
    """

    compute: float
    by_phase: dict[str, float]
    expert: float
    exposed: dict[str, float]
    hidden: float
    host: float
    copies: HostWork = NO_WORK

    @property
    def seconds(self) -> float:
        """From the pass's start to its end, if it runs alone."""
        return self.with_expert(self.expert)

    @property
    def late(self) -> float:
        """Seconds in which the device waits for the host, if the pass runs alone."""
        return max(0.0, self.host - self.compute - self.expert - sum(self.exposed.values()))

    def with_expert(self, expert: float) -> float:
        """Seconds, where so much of the expert-parallel communication is not hidden."""
        return max(self.host, self.compute + expert + sum(self.exposed.values()))


@dataclass(frozen=True)
class ChunkCost:
    """Both passes of one micro-batch."""

    forward: PassCost
    backward: PassCost


def chunk_cost(
    trace: Trace, facts: JobFacts, cluster: Cluster, efficiency: Efficiency
) -> ChunkCost:
    """Cost of a trace of one micro-batch.

    Args:
        trace: of one chunk, without interleaving.
        facts: of the job.
        cluster: where it runs.
        efficiency: how near to its peaks.

    Raises:
        ValueError: the device has no peak for a product's type.
    """
    parts = [
        _pass_cost(
            [op for op in trace.ops if not op.of_step and is_forward(op) == forward],
            [c for c in micro_batch_collectives(trace) if is_forward(c) == forward],
            facts, cluster, efficiency,
        )
        for forward in (True, False)
    ]  # fmt: skip
    return ChunkCost(*parts)


def is_forward(record: Op | Collective) -> bool:
    """Whether it belongs to the forward pass; a recomputation does not."""
    return record.pass_ == FORWARD


def micro_batch_collectives(trace: Trace) -> Iterator[Collective]:
    """Those of every micro-batch, transfers between stages left out."""
    for one in trace.collectives:
        if one.of_micro_batch and one.group != "pp":
            yield one


def _pass_cost(
    ops: list[Op],
    collectives: list[Collective],
    facts: JobFacts,
    cluster: Cluster,
    efficiency: Efficiency,
) -> PassCost:
    by_phase: dict[str, float] = defaultdict(float)
    products: dict[str, float] = defaultdict(float)
    copies, ops = host_work(ops), [op for op in ops if op.of_device]
    launches = sum(one.count for one in collectives if one.phase not in facts.graphed)
    layers = sum(op.count for op in ops if op.name in _ONCE_A_LAYER)
    launches += layers * facts.graphs_per_layer
    host = launches * efficiency.kernel_seconds + (efficiency.pass_seconds if facts.pp > 1 else 0.0)
    waits = 0.0
    for op in ops:
        one = operation(op)
        seconds = op_seconds(op, cluster, efficiency) * op.count
        by_phase[op.phase] += seconds
        if op.name == DEVICE_WAIT:
            waits += op.count * efficiency.wait_seconds
        elif op.phase not in facts.graphed:
            host += op.count * host_seconds(op, efficiency)
        if one.flops:
            products[op.phase] += seconds
    of_weights = sum(
        op_seconds(op, cluster, efficiency) * op.count for op in ops if op.name in WEIGHT_GRADIENTS
    )
    exposed: dict[str, float] = defaultdict(float)
    expert = hidden = 0.0
    buckets = sum(one.count for one in collectives if _of_zero(one))
    for group, phase, share, seconds in _communication(
        collectives, facts, cluster, buckets, efficiency
    ):
        of_experts = phase in (DISPATCH, COMBINE)
        window = products[ATTENTION] if group == "cp" else products[phase]
        if of_experts:
            window = of_weights
        elif is_of_replicas(group):
            window = max(0.0, sum(by_phase.values()) - hidden)
        behind = min(share * seconds, window) * efficiency.hidden_share
        hidden += behind
        if of_experts:
            expert += seconds - behind
        else:
            exposed[group] += seconds - behind
    device = sum(by_phase.values())
    compute = device + waits + efficiency.overlap_tax * hidden
    if copies != NO_WORK:
        crossing = max(copies.copying(host_of(cluster)))
        window = compute + expert + sum(exposed.values())
        exposed["host"] = max(0.0, crossing - window)
        hidden += crossing - exposed["host"]
    return PassCost(compute, dict(by_phase), expert, dict(exposed), hidden, host + waits, copies)


def op_seconds(op: Op, cluster: Cluster, efficiency: Efficiency) -> float:
    """Of one operator on the cluster's device: as it was timed there, else by the curve of its
    kind.
    """
    seconds = efficiency.measured.operator(op)
    if seconds is None:
        one = operation(op)
        seconds = efficiency.curves[one.kind].seconds(one, cluster.device)
    return seconds * efficiency.measured.in_step(op)


def host_seconds(op: Op, efficiency: Efficiency) -> float:
    """Of the host, for one operator: the kernels it launches, or one node of autograd.

    Transformer Engine's grouped GEMM is a launch for each group, from C++; ours is one.
    """
    if op.name == FUNCTION_NODE:
        return efficiency.function_seconds
    if op.name == NODE:
        return efficiency.node_seconds
    launches = 1
    if op.name.startswith("fused.grouped_gemm"):
        launches = next(shape[0] for shape in (*op.inputs, *op.outputs) if len(shape) == 3)
    return launches * efficiency.kernel_seconds


def _communication(
    collectives: list[Collective], facts: JobFacts, cluster: Cluster, buckets: int,
    efficiency: Efficiency,
) -> Iterator[tuple[str, str, float, float]]:  # fmt: skip
    """(group, phase, share that can be hidden, seconds) of all collectives of a kind and phase.

    Args:
        collectives, facts, cluster, efficiency: as of `_pass_cost`.
        buckets: collectives that ZeRO has among them.
    """
    found: dict[tuple[str, str, float], float] = defaultdict(float)
    for one in collectives:
        seconds = one.count * collective_seconds(one, facts, cluster, efficiency)
        waited = efficiency.measured.waited(one)
        share = 0.0 if waited else hideable_share(one, facts, buckets)
        found[one.group, one.phase, share] += seconds
    for (group, phase, share), seconds in found.items():
        yield group, phase, share, seconds


def _of_zero(one: Collective) -> bool:
    """Whether ZeRO sends it in a pass: parameters or gradients over their replicas."""
    return bool(one.in_pass) and is_of_replicas(one.group)


def is_of_replicas(group: str) -> bool:
    """Whether the ranks of a group hold the same weights, or pieces of them."""
    return group in _REPLICAS or any(name in group for name in _OF_INSTANCES)


def hideable_share(one: Collective, facts: JobFacts, buckets: int) -> float:
    """Share of a collective that can go on beside compute of its own pass."""
    if one.phase in (DISPATCH, COMBINE):
        beside = facts.overlap_dispatch_backward and one.pass_ == BACKWARD
        return float(beside and one.phase == DISPATCH)
    if _of_zero(one) and facts.overlap_zero:
        return 1.0 - 1.0 / buckets
    if one.group == "cp":  # Mamba's heads are there before its scan begins
        return 0.0 if one.phase == MAMBA else 1.0 - 1.0 / one.ranks
    if one.group != "tp":
        return 0.0
    if facts.overlap_tp:
        return 1.0 - 1.0 / one.ranks
    return _HIDDEN_IN_BACKWARD.get(one.kind, 0.0) if one.pass_ == BACKWARD else 0.0


def collective_seconds(
    one: Collective, facts: JobFacts, cluster: Cluster, efficiency: Efficiency
) -> float:
    """Of one collective: what a step that was timed waits for it; else, if all ranks of its group
    call together, as it was timed, or by the cluster's links.
    """
    timed = efficiency.measured.collective(one, cluster)
    if timed is not None:
        return timed
    placement = place_stride(one.ranks, one.stride, cluster)
    if one.kind in HIERARCHICAL:
        return hierarchical_dispatch_cost(
            one.bytes, 1.0, *_destinations(facts, placement), placement, cluster
        ).seconds
    if one.kind not in OPERATIONS:
        return 0.0  # barriers and gathers of a few bytes, which no training step waits for
    if one.kind in ("send", "recv"):
        placement = place_stride(2, one.stride, cluster)
    return collective_cost(one.kind, one.bytes, placement, cluster).seconds


def _destinations(facts: JobFacts, placement: Placement) -> tuple[float, float]:
    """(domains, ranks) of the group that hold one of a token's experts, on average."""
    groups, allowed = facts.router_groups or 1, facts.router_group_topk or 1
    limited = facts.num_experts * allowed // groups

    def parts(count: int) -> float:
        if count == 1:
            return 1.0
        plain = expected_parts(facts.topk, facts.num_experts, count)
        reached = count * allowed // groups
        if allowed == groups or reached < 1 or limited % reached:
            return plain
        return min(plain, expected_parts(facts.topk, limited, reached))

    return parts(placement.domains), parts(placement.size)


REDUCTIONS = ("reduce_scatter", "all_reduce", "reduce")
_UPDATE = "fused.adam"
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
            gradients zeroed; with the host's part of it.
        host: what of the update is the host's.
        agree: small collectives: norms, losses, faults.
    """

    reduce: float
    reduce_buckets: int
    gather: float
    gather_buckets: int
    optimizer: float
    agree: float
    host: HostWork


def step_cost(
    chunks: Sequence[Trace], facts: JobFacts, cluster: Cluster, efficiency: Efficiency
) -> StepCost:
    """Cost of one rank's step outside its passes.

    Args:
        chunks: traces of the rank's chunks; the first is chunk 0.
        facts: of the job.
        cluster, efficiency: where, and how near to its peaks.

    Raises:
        ValueError: the host updates parameters, and the cluster has none.
    """
    reductions = [c for c in _of_step(chunks) if c.kind in REDUCTIONS]
    gathers = [c for c in _of_step(chunks) if c.kind == "all_gather"]
    small = [c for c in chunks[0].collectives if not c.of_micro_batch and c.bytes <= _SMALL]
    ops = [op for trace in chunks for op in trace.ops if op.of_step]
    work = host_work(ops)
    others, own = (
        sum(
            op.count * op_seconds(op, cluster, efficiency)
            for op in ops
            if op.of_device and (op.name == _UPDATE) == is_update
        )
        for is_update in (False, True)
    )
    if work != NO_WORK:
        own = update_seconds(work, own, host_of(cluster), overlapped=facts.overlap_host_copies)
    return StepCost(
        _seconds(reductions, facts, cluster, efficiency),
        sum(c.count for c in reductions),
        _seconds(gathers, facts, cluster, efficiency),
        sum(c.count for c in gathers),
        others + own,
        _seconds(small, facts, cluster, efficiency),
        work,
    )


def _of_step(chunks: Iterable[Trace]) -> list[Collective]:
    return [
        c
        for trace in chunks
        for c in trace.collectives
        if not c.of_micro_batch and c.bytes > _SMALL
    ]


def _seconds(
    collectives: Iterable[Collective], facts: JobFacts, cluster: Cluster, efficiency: Efficiency
) -> float:
    return sum(
        one.count * collective_seconds(one, facts, cluster, efficiency) for one in collectives
    )
