"""An efficiency of what `megatron-mone calibrate` timed: the times themselves, and curves for what
has none.

An operator timed by itself finds its memory in the caches and fresh pages at hand. On CPU ranks
each phase is therefore scaled by what it takes in a step of one layer, the host included, which is
the device there; on a GPU the host stands beside, as a pass is never faster than its launches.
Touches nothing.
"""

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
    link_key,
    operator_key,
)
from megatron_mone.planning.cost.rank_cost import host_seconds, op_seconds
from megatron_mone.planning.cost.roofline import operation
from megatron_mone.planning.fitting.node_times import COPY, OperatorTime, Times, Work
from megatron_mone.planning.fitting.phase_fit import PhaseModel, PhaseTime, fit_phases


@dataclass(frozen=True)
class Launch:
    """A step of the small job, in seconds.

    Attributes:
        step: that it took, as far as it has operators.
        operators: of these, by their own times and curves.
        launches: kernels of its passes.
        phases: phase -> the first over the second.
    """

    step: float
    operators: float
    launches: int
    phases: Mapping[str, float]


@dataclass(frozen=True)
class NodeFit:
    """What came of it.

    Attributes:
        efficiency: the file's.
        times: that it was made of.
        launch: of the small job; None where it was not timed.
        curved: seconds of each timed operator by the curve of its kind, in the order of the times.
        covered: share of the price of the job's operators, as it was, that is timed.
        kinds: of operations -> (timed, of the job); every kind that the job has.
    """

    efficiency: Efficiency
    times: Times
    launch: Launch | None
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
    launch = _launch(work, times, cluster, alone)
    fitted = _in_step(launch, alone) if times.on_cpu else _beside_host(launch, work, alone)
    curved = PhaseModel(phases, cluster.device).seconds(alone)
    share = sum(one.share for one in times.operators)
    return NodeFit(
        replace(fitted, source=_source(times, share)), times, launch,
        tuple(float(seconds) for seconds in curved), share, _kinds(work, times),
    )  # fmt: skip


def _launch(work: Work, times: Times, cluster: Cluster, alone: Efficiency) -> Launch | None:
    """What a step of the small job says; None where it has none."""
    small = work.small
    if small is None or times.small_job is None:
        return None
    priced: dict[str, float] = defaultdict(float)
    for one, count in zip(small.operators, small.counts, strict=True):
        priced[_group(one.phase)] += count * op_seconds(one.op(), cluster, alone)
    taken: dict[str, float] = defaultdict(float)
    for phase, ms in times.small_job.phases_ms.items():
        taken[_group(phase)] += ms / 1e3
    groups = [
        group for group in priced
        if priced[group] > 0 and taken[group] > 0 and (times.on_cpu or group != OPTIMIZER)
    ]  # fmt: skip
    step, alone_seconds = (sum(part[group] for group in groups) for part in (taken, priced))
    if not groups:
        return None
    factors = {group: taken[group] / priced[group] for group in groups}
    phases = {one.operator.phase for one in work.operators}
    return Launch(step, alone_seconds, small.launches, {
        phase: factors.get(_group(phase), step / alone_seconds) for phase in sorted(phases)
    })  # fmt: skip


def _group(phase: str) -> str:
    """Of phases that a trace and a profile part otherwise: the choice is a kernel of the gate's,
    and what is once a step is one."""
    if phase in (GRAD_REDUCE, CLIPPING, PARAMETER_GATHER):
        return OPTIMIZER
    return GATE_GEMM if phase == SELECTION else phase


def _in_step(launch: Launch | None, alone: Efficiency) -> Efficiency:
    """CPU ranks: each phase as it is in a step."""
    phases = launch.phases if launch else {}
    return replace(alone, measured=replace(alone.measured, phases=phases))


def _beside_host(launch: Launch | None, work: Work, alone: Efficiency) -> Efficiency:
    """GPUs: all that the host takes scaled to a step in which the device waits for it; else what is
    assumed stays.
    """
    start, scale = Efficiency(), 1.0
    if launch and work.small and launch.step > launch.operators:
        assumed = sum(
            count * host_seconds(one.op(), start)
            for one, count in zip(work.small.operators, work.small.counts, strict=True)
            if _group(one.phase) != OPTIMIZER
        )
        scale = launch.step / assumed if assumed else 1.0
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
    host = "" if times.small_job else "; the host's launches are assumed"
    return (
        f"timed on {times.ranks} ranks of {times.device}, {times.date}: {len(times.operators)} "
        f"operators of {times.job.model} ({times.job.layout}), {share:.1%} of their price"
        f"{by_copy}, {len(times.links)} collectives; curves fitted to these price the rest{host}; "
        "overlap is assumed"
    )


def of_kind(one: OperatorTime) -> str:
    """The kind of operation that an operator is."""
    return operation(one.operator.op()).kind
