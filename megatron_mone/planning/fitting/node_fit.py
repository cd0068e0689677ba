"""An efficiency of what `megatron-mone calibrate` timed: the times themselves, and curves for what
has none.

An operator timed by itself finds its memory in the caches, fresh pages at hand and its core free.
Each phase is therefore scaled by what it takes in a step of a few layers in the job's own layout,
and a collective takes what that step waits for it: the ranks that are late and what they share are
in it, and what overlaps is not. On a GPU the host stands beside, as a pass is never faster than its
launches.
Touches nothing.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_mone.common.phases import (
    CLIPPING,
    GATE_GEMM,
    GRAD_REDUCE,
    OPTIMIZER,
    PARAMETER_GATHER,
    SELECTION,
)
from megatron_mone.planning.cost.efficiency import HOST, Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.measured_times import (
    LinkKey,
    MeasuredTimes,
    OperatorKey,
    Points,
    WaitKey,
    link_key,
    operator_key,
)
from megatron_mone.planning.cost.rank_cost import host_seconds, op_seconds
from megatron_mone.planning.cost.roofline import operation
from megatron_mone.planning.fitting.node_times import (
    COPY,
    OperatorTime,
    SmallJob,
    StepTime,
    Times,
    Work,
)
from megatron_mone.planning.fitting.phase_fit import PhaseModel, PhaseTime, fit_phases
from megatron_mone.planning.tracing.trace import Op


@dataclass(frozen=True)
class Step:
    """Of a small job, without collectives, in seconds.

    Attributes:
        seconds: that it took, as far as it has operators.
        operators: of these, by their own times and curves.
        launches: kernels of its passes.
        phases: phase -> the first over the second.
    """

    seconds: float
    operators: float
    launches: int
    phases: Mapping[str, float]


@dataclass(frozen=True)
class NodeFit:
    """What came of it.

    Attributes:
        efficiency: the file's.
        times: that it was made of.
        small: step of the job in the layout; None where it was not timed.
        launch: of the one on one rank, likewise; None on CPU ranks.
        curved: seconds of each timed operator by the curve of its kind, in the order of the times.
        covered: share of the price of the job's operators, as it was, that is timed.
        kinds: of operations -> (timed, of the job); every kind that the job has.
    """

    efficiency: Efficiency
    times: Times
    small: Step | None
    launch: Step | None
    curved: tuple[float, ...]
    covered: float
    kinds: Mapping[str, tuple[int, int]]


def fit_nodes(work: Work, times: Times, cluster: Cluster) -> NodeFit:
    """Make an efficiency of times.

    Args:
        work: that was to be timed.
        times: of the same job.
        cluster: whose nodes were timed.

    Raises:
        ValueError: one line; nothing was timed.
    """
    if not times.operators:
        raise ValueError("no operator was timed: give calibrate more --seconds")
    phases = [
        PhaseTime("", one.operator.name, "", one.seconds, {operation(one.operator.op()): 1.0})
        for one in times.operators
    ]
    start = Efficiency().without_host()
    timed = {operator_key(one.operator.op()): one.seconds for one in times.operators}
    alone = replace(
        fit_phases(phases, cluster.device, start), measured=MeasuredTimes(timed, _points(times))
    )
    small = _step(work.small, times.small_job, cluster, alone)
    if small is not None:
        alone = replace(
            alone, measured=replace(alone.measured, operators=_as_in_small(work, timed))
        )
    launch = _step(work.launch, times.launch_job, cluster, alone, (OPTIMIZER,))
    fitted = alone if times.on_cpu else _beside_host(launch, work, alone)
    fitted = replace(fitted, measured=_in_step(small, work, times, alone.measured))
    curved = PhaseModel(phases, cluster.device).seconds(alone)
    share = sum(one.share for one in times.operators)
    return NodeFit(
        replace(fitted, source=_source(times, share)), times, small, launch,
        tuple(float(seconds) for seconds in curved), share, _kinds(work, times),
    )  # fmt: skip


def _step(
    job: SmallJob | None,
    step: StepTime | None,
    cluster: Cluster,
    alone: Efficiency,
    left_out: tuple[str, ...] = (),
) -> Step | None:
    """What a step of a small job says; None where it has none.

    Args:
        job, step: whose, and what was timed of it.
        cluster, alone: what its operators take by themselves.
        left_out: phases.
    """
    if job is None or step is None:
        return None
    priced: dict[str, float] = defaultdict(float)
    for one, count in zip(job.operators, job.counts, strict=True):
        priced[_group(one.phase)] += count * op_seconds(one.op(), cluster, alone)
    taken: dict[str, float] = defaultdict(float)
    for phase, ms in step.phases_ms.items():
        taken[_group(phase)] += ms / 1e3
    groups = [
        group for group in priced
        if priced[group] > 0 and taken[group] > 0 and group not in left_out
    ]  # fmt: skip
    if not groups:
        return None
    whole, operators = (sum(part[group] for group in groups) for part in (taken, priced))
    return Step(whole, operators, job.launches, {
        group: taken[group] / priced[group] for group in groups
    })  # fmt: skip


def _as_in_small(work: Work, timed: Mapping[OperatorKey, float]) -> dict[OperatorKey, float]:
    """The times by themselves, so that the small job's scales hold for them all.

    A buffer of its gradients may fit caches that the job's does not. In a step neither is found
    there, which its scale says: so what only moves bytes, of another size than the small job's,
    takes as much more than the nearest of its name as it moves.
    """
    assert work.small is not None
    ops = {operator_key(one.op()): one.op() for one in work.small.operators}
    likes: dict[str, list[Op]] = defaultdict(list)
    for key, op in ops.items():
        if key in timed and operation(op).kind == "memory" and _moved(op):
            likes[op.name].append(op)
    found = dict(timed)
    for row in work.operators:
        op = row.operator.op()
        key = operator_key(op)
        if key in timed and key not in ops and operation(op).kind == "memory" and likes[op.name]:
            size = 1 + _moved(op)
            like = min(likes[op.name], key=lambda one: abs(math.log(_moved(one) / size)))
            found[key] = timed[operator_key(like)] * _moved(op) / _moved(like)
    return found


def _moved(op: Op) -> int:
    return op.bytes_read + op.bytes_written


def _group(phase: str) -> str:
    """Of phases that a trace and a profile part otherwise: the choice is a kernel of the gate's,
    and what is once a step is one."""
    if phase in (GRAD_REDUCE, CLIPPING, PARAMETER_GATHER):
        return OPTIMIZER
    return GATE_GEMM if phase == SELECTION else phase


def _in_step(step: Step | None, work: Work, times: Times, alone: MeasuredTimes) -> MeasuredTimes:
    """Each phase of the job, and each collective of a group, as they are in a step."""
    if step is None:
        return alone
    others = step.seconds / step.operators
    phases = sorted({one.operator.phase for one in work.operators})
    return replace(
        alone,
        phases={phase: step.phases.get(_group(phase), others) for phase in phases},
        waits=_waits(work, times),
    )


def _waits(work: Work, times: Times) -> dict[WaitKey, Points]:
    """Within a stage: what stages wait for each other is the pipeline's."""
    assert work.small is not None
    assert times.small_job is not None
    places = {one.group: one for one in work.small.groups}
    found: dict[WaitKey, dict[int, float]] = defaultdict(dict)
    for one in times.small_job.collectives:
        place = places.get(one.group)
        if place is not None:
            key = one.kind, one.group, place.ranks, place.stride
            found[key][one.bytes] = one.ms / 1e3 / one.calls
    return {key: tuple(sorted(sizes.items())) for key, sizes in found.items()}


def _beside_host(launch: Step | None, work: Work, alone: Efficiency) -> Efficiency:
    """GPUs: all that the host takes scaled to a step in which the device waits for it; else what is
    assumed stays.
    """
    start, scale = Efficiency(), 1.0
    if launch and work.launch and launch.seconds > launch.operators:
        assumed = sum(
            count * host_seconds(one.op(), start)
            for one, count in zip(work.launch.operators, work.launch.counts, strict=True)
            if _group(one.phase) != OPTIMIZER
        )
        scale = launch.seconds / assumed if assumed else 1.0
    host: dict[str, Any] = {name: min(1.0, scale * getattr(start, name)) for name in HOST}
    return replace(alone, **host)


def _points(times: Times) -> dict[LinkKey, tuple[tuple[int, float], ...]]:
    found: dict[LinkKey, dict[int, float]] = defaultdict(dict)
    for one in times.links:
        found[link_key(one.link.collective())][one.link.bytes] = one.seconds
    return {key: tuple(sorted(sizes.items())) for key, sizes in found.items()}


def _kinds(work: Work, times: Times) -> dict[str, tuple[int, int]]:
    timed = {operator_key(one.operator.op()) for one in times.operators}
    found: dict[str, list[bool]] = defaultdict(list)
    for one in work.operators:
        op = one.operator.op()
        found[operation(op).kind].append(operator_key(op) in timed)
    return {kind: (sum(each), len(each)) for kind, each in sorted(found.items())}


def _source(times: Times, share: float) -> str:
    stand_ins = sum(one.share for one in times.operators if one.by == COPY)
    by_copy = f", {stand_ins:.1%} of it as copies of their bytes" if stand_ins >= 0.0005 else ""
    host = "" if times.on_cpu or times.launch_job else "; the host's launches are assumed"
    step = "" if times.small_job else "; no step was timed"
    return (
        f"timed on {times.ranks} ranks of {times.device}, {times.date}: {len(times.operators)} "
        f"operators of {times.job.model} ({times.job.layout}), {share:.1%} of their price"
        f"{by_copy}, {len(times.links)} collectives; curves fitted to these price the rest{host}"
        f"{step}"
    )


def of_kind(one: OperatorTime) -> str:
    """The kind of operation that an operator is."""
    return operation(one.operator.op()).kind
