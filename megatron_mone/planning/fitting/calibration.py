"""Calibration: a device's efficiency from a profile, and an honest account of how well it fits.

    profile.json -> jobs traced on several ranks -> phases as sums of operations -> curves -> checks

What is measured are means over ranks, so what is fitted are means over ranks, each traced with the
rows that its experts took. Communication, waiting and what overlap costs are not fitted: they stay
what the cluster file and the assumptions say. May touch: the tracer's processes and cache.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.rank_cost import collective_seconds
from megatron_mone.planning.cost.roofline import Operation, operation
from megatron_mone.planning.cost.routing_skew import REPLAYED, Skew, expert_rows
from megatron_mone.planning.fitting.calibration_result import (
    Calibration,
    CommunicationCheck,
    FittedPhase,
    StepCheck,
    summary,
)
from megatron_mone.planning.fitting.measured_profile import (
    NOT_COMPUTE,
    MeasuredProfile,
    ProfiledRun,
    check_device,
)
from megatron_mone.planning.fitting.phase_fit import PhaseModel, PhaseTime, fit_phases
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace_server import TracedJob, Tracer

MOST_RANKS = 8
"""Ranks of an expert-parallel group that are traced; of larger groups so many, evenly spaced."""
_KERNEL_SECONDS = 5e-6  # a fit's start


def calibrate(profile: MeasuredProfile, cluster: Cluster, tracer: Tracer) -> Calibration:
    """Fit the efficiency of a cluster's device to a profile.

    Args:
        profile: read by `read_profile`.
        cluster: whose device the profile was measured on.
        tracer: entered.

    Raises:
        ValueError: one line; another device, or a run that cannot be traced.
    """
    check_device(profile, cluster)
    traced = {run.name: _traced(run, profile, tracer) for run in profile.runs}
    phases, left_out = [], list(profile.left_out)
    for run in profile.runs:
        found, missing = _phases(run, traced[run.name])
        phases += found
        left_out += missing
    if not phases:
        raise ValueError(f"{profile.path}: no measured phase has operators in its trace")
    # CPU ranks make an operation when they come to it: what the host costs is in its launch.
    start = replace(
        Efficiency().without_host(), kernel_seconds=0.0 if profile.on_cpu else _KERNEL_SECONDS
    )
    efficiency = fit_phases(phases, cluster.device, start)
    whole = PhaseModel(phases, cluster.device)
    runs = [run.name for run in profile.runs]
    held_runs = {name: _without(phases, "run", name, cluster, start) for name in runs}
    names = dict.fromkeys(one.phase for one in phases)
    held_phases = {name: _without(phases, "phase", name, cluster, start) for name in names}
    columns = (
        whole.seconds(efficiency),
        _held_out(whole, phases, "run", held_runs),
        _held_out(whole, phases, "phase", held_phases),
    )
    fitted = tuple(
        FittedPhase(one.run, one.phase, one.pass_, one.seconds, *values)
        for one, *values in zip(phases, *columns, strict=True)
    )
    efficiency = replace(efficiency, source=_source(profile, fitted))
    steps = [
        _step(run, traced[run.name][0], cluster, efficiency, held_runs[run.name], phases)
        for run in profile.runs
    ]
    communication = [
        c for run in profile.runs for c in _communication(run, traced[run.name], cluster)
    ]
    return Calibration(
        efficiency, fitted, tuple(steps), tuple(communication), tuple(whole.kinds), tuple(left_out)
    )


def _traced(run: ProfiledRun, profile: MeasuredProfile, tracer: Tracer) -> list[TracedJob]:
    """The run on several ranks of an expert-parallel group, the one with the most rows first."""
    try:
        facts = tracer.describe(run.flags, profile.world_size).facts
        if facts.document_tokens:
            raise ValueError(
                "its documents are packed, and the profile does not hold their lengths"
            )
        return [
            tracer.trace(run.flags, profile.world_size, rows) for rows in rank_rows(run.rows, facts)
        ]
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{profile.path}: run {run.name} cannot be traced: {reason}") from error


def rank_rows(rows: Sequence[float], facts: JobFacts) -> list[list[int] | None]:
    """Rows of each expert as each of several ranks sees them, its own experts first.

    Args:
        rows: that each of E experts took, in any unit; empty in a dense model.
        facts: of the job.

    Returns:
        Up to MOST_RANKS orders, that of the fullest rank first; [None] in a dense model.
    """
    if not rows or not facts.num_experts:
        return [None]
    tokens = facts.micro_batch_size * facts.seq_length // (facts.tp * facts.cp)
    skew = Skew(REPLAYED, 0.0, (tuple(rows),))
    first = expert_rows(skew, tokens, facts.topk, facts.num_experts, facts.ep)
    assert first is not None
    own = facts.num_experts // facts.ep
    ranks = np.arange(min(facts.ep, MOST_RANKS)) * facts.ep // min(facts.ep, MOST_RANKS)
    return [np.roll(first, -own * rank).tolist() for rank in ranks]


def _phases(run: ProfiledRun, traced: Sequence[TracedJob]) -> tuple[list[PhaseTime], list[str]]:
    """Phases of a run that can be fitted, and why the others are not."""
    operations = mean_operations(traced)
    found: list[PhaseTime] = []
    reasons: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (phase, pass_), seconds in run.passes.items():
        if phase in NOT_COMPUTE:
            reasons["not compute of the device"][phase] += seconds
        elif seconds and not operations.get((phase, pass_)):
            reasons["no operator of it in the trace"][f"{phase} {pass_}"] += seconds
        elif seconds:
            found.append(PhaseTime(run.name, phase, pass_, seconds, operations[phase, pass_]))
    left_out = [
        f"run {run.name}, {sum(seconds.values()) / run.step:.1%} of its step, {reason}: "
        f"{', '.join(seconds)}"
        for reason, seconds in reasons.items()
    ]
    return found, left_out


def mean_operations(
    traced: Sequence[TracedJob],
) -> dict[tuple[str, str], dict[Operation, float]]:
    """(phase, pass) -> operation -> how often a step: mean over stages and the ranks traced.

    Args:
        traced: one job, with the rows of several ranks.
    """
    found: dict[tuple[str, str], dict[Operation, float]] = defaultdict(lambda: defaultdict(float))
    for job in traced:
        for trace in job.traces.values():
            for op in trace.ops:
                one = operation(op)
                if not one.flops and not one.bytes:
                    continue
                often = 1 if op.of_step else job.facts.micro_batches
                share = op.count * often / (len(traced) * job.facts.pp)
                found[op.phase, op.pass_][one] += share
    return {key: dict(operations) for key, operations in found.items()}


def _without(
    phases: Sequence[PhaseTime], part: str, name: str, cluster: Cluster, start: Efficiency
) -> Efficiency | None:
    """The fit without one run or phase; None where nothing else was measured."""
    others = [one for one in phases if getattr(one, part) != name]
    return fit_phases(others, cluster.device, start) if others else None


def _held_out(
    model: PhaseModel,
    phases: Sequence[PhaseTime],
    part: str,
    fits: Mapping[str, Efficiency | None],
) -> list[float | None]:
    """Seconds of each phase by the fit that has not seen it."""
    predicted = {name: None if fit is None else model.seconds(fit) for name, fit in fits.items()}
    found: list[float | None] = []
    for place, one in enumerate(phases):
        seconds = predicted[getattr(one, part)]
        found.append(None if seconds is None else float(seconds[place]))
    return found


def _step(
    run: ProfiledRun,
    traced: TracedJob,
    cluster: Cluster,
    efficiency: Efficiency,
    held_out: Efficiency | None,
    phases: Sequence[PhaseTime],
) -> StepCheck:
    def seconds(one: Efficiency) -> float:
        return predict(traced.traces, traced.facts, cluster, one).seconds

    return StepCheck(
        run.name,
        run.step,
        seconds(efficiency),
        None if held_out is None else seconds(held_out),
        sum(one.seconds for one in phases if one.run == run.name) / run.step,
    )


def _communication(
    run: ProfiledRun, traced: Sequence[TracedJob], cluster: Cluster
) -> Iterator[CommunicationCheck]:
    predicted: dict[str, float] = defaultdict(float)
    for job in traced:
        for trace in job.traces.values():
            for one in trace.collectives:
                often = one.count * (job.facts.micro_batches if one.of_micro_batch else 1)
                seconds = collective_seconds(one, job.facts, cluster, Efficiency())
                predicted[f"{one.kind} {one.group}"] += (
                    seconds * often / (len(traced) * job.facts.pp)
                )
    for name, measured in run.communication.items():
        if name in predicted:
            yield CommunicationCheck(run.name, name, measured, predicted[name])


def _source(profile: MeasuredProfile, phases: Sequence[FittedPhase]) -> str:
    runs = ", ".join(dict.fromkeys(one.run for one in phases))
    errors = summary([(one.measured, one.fitted) for one in phases])
    assert errors is not None
    return (
        f"fitted to {len(phases)} passes of phases of {runs}, profiled on {profile.world_size} "
        f"ranks of {profile.device}, {profile.date}: off by {errors['of_time']:.1%} of their "
        f"time, median error {errors['median']:.1%}, worst {errors['worst']:.1%}; overlap is "
        "assumed"
    )
