"""One step of a job, predicted: seconds and where they go, bytes of every stage, whether it fits.

    step = parameters gathered + passes of the pipeline + gradients reduced + optimizer

each as far as nothing hides it. The stage that ends last decides, and its parts add up to the step.
May touch: nothing.
Shapes: P stages, V chunks of a stage, M micro-batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_mone.common.phases import OTHER
from megatron_mone.planning.cost.bands import Band, memory_band, time_band
from megatron_mone.planning.cost.documents import in_documents
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.host_cost import HostWork, host_of
from megatron_mone.planning.cost.pipeline import (
    PipelineRun,
    Schedule,
    exposed_communication,
    simulate,
)
from megatron_mone.planning.cost.rank_cost import (
    ChunkCost,
    PassCost,
    StepCost,
    chunk_cost,
    collective_seconds,
    is_of_replicas,
    step_cost,
)
from megatron_mone.planning.cost.rank_memory import RankMemory, rank_memory
from megatron_mone.planning.cost.roofline import DTYPES
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import Collective, Trace


@dataclass(frozen=True)
class Prediction:
    """One job on one cluster.

    Attributes:
        facts: of the job.
        cluster, efficiency: it was predicted for.
        seconds: of one step.
        parts: name -> seconds of the stage that ends last: "compute", "expert parallel", other
            groups, "bubble", "data parallel", "optimizer"; they add up to `seconds`.
        phases: phase -> seconds of compute in a step of that stage; they add up to that part.
            What kernels do not fill, since the host is late, is in `other`.
        hidden: seconds of communication that goes on beside compute there.
        last: the stage that ends last.
        run: the simulated pipeline.
        costs_PV: of one micro-batch in each chunk.
        memory_P: of a rank of each stage.
        collectives: in the traces of the stage that ends last.
        executed_flops: of one device and step, mean over stages, recomputation included.
        gathering: seconds by which gathering parameters delays the first pass.
        reducing_P: seconds of each stage from its last pass until its gradients are reduced.
        band: around `seconds`.
        peak_band: around `peak`, bytes.
        host_P: what each stage has of the host in a step: its update, and copies of passes.
    """

    facts: JobFacts
    cluster: Cluster
    efficiency: Efficiency
    seconds: float
    parts: dict[str, float]
    phases: dict[str, float]
    hidden: float
    last: int
    run: PipelineRun
    costs_PV: list[list[ChunkCost]]
    memory_P: list[RankMemory]
    collectives: list[Collective]
    executed_flops: float
    gathering: float
    reducing_P: list[float]
    band: Band
    peak_band: Band
    host_P: list[HostWork]

    @property
    def fullest(self) -> int:
        """The stage whose rank needs the most memory."""
        return max(range(len(self.memory_P)), key=lambda stage: self.memory_P[stage].peak)

    @property
    def peak(self) -> float:
        """Bytes of the fullest stage's rank."""
        return self.memory_P[self.fullest].peak

    @property
    def fits(self) -> bool:
        """Whether every stage fits its device, and what it keeps there its share of the host."""
        return self.first_unfit is None

    @property
    def first_unfit(self) -> str | None:
        """The part of memory at which a limit is passed, of the fullest stage; `host` where that is
        the host's."""
        part = self.memory_P[self.fullest].first_that_does_not_fit(self.cluster.device)
        held = max(memory.host for memory in self.memory_P)
        on_host = held > 0 and held > host_of(self.cluster).memory_bytes
        return "host" if part is None and on_host else part

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        tokens = self.facts.global_batch_size * self.facts.seq_length
        return tokens / self.seconds / self.facts.world_size

    @property
    def flops_per_second(self) -> float:
        """Of one device, by Megatron's own count of the model, of MoNE's experts kept neurons."""
        return self.facts.active_flops_per_step / self.seconds / self.facts.world_size

    @property
    def utilisation(self) -> float:
        """MFU: of the dense peak of the parameters' type, also where GEMMs run in fp8."""
        return self.flops_per_second / self.cluster.device.peak(DTYPES[self.facts.params_dtype])

    @property
    def busy_P(self) -> NDArray[np.float64]:
        """[P] seconds of each stage's passes."""
        found = np.zeros(self.facts.pp)
        for event in self.run.events:
            found[event.stage] += event.end - event.start
        return found

    @property
    def imbalance_P(self) -> NDArray[np.float64]:
        """[P] seconds by which each stage is done sooner than the slowest, and waits for it."""
        busy_P = self.busy_P
        return np.asarray(busy_P.max() - busy_P)

    @property
    def fill(self) -> float:
        """Seconds that any stage waits beside: the pipeline fills and drains, and sends."""
        return max(0.0, float(self.run.end_P.max() - self.busy_P.max()))

    @property
    def imbalance(self) -> float:
        """Of the bubble, what is no fill: the stage that ends last waits for a slower one."""
        return min(self.parts["bubble"], float(self.imbalance_P[self.last]))

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing hides, bubbles left out."""
        own = ("compute", "bubble", "optimizer")
        return sum(seconds for name, seconds in self.parts.items() if name not in own)


def schedule_of(facts: JobFacts) -> Schedule:
    """The pipeline schedule that Megatron runs for a job."""
    return Schedule(
        facts.pp,
        facts.micro_batches,
        facts.vp,
        facts.microbatch_group_size_per_vp_stage if facts.vp > 1 else None,
        extra_warmup=facts.overlap_expert_parallel and facts.vp > 1,
    )


def predict(
    traces: Mapping[tuple[int, int], Trace],
    facts: JobFacts,
    cluster: Cluster,
    efficiency: Efficiency,
) -> Prediction:
    """Predict one step.

    Args:
        traces: (stage, chunk) -> trace of one micro-batch.
        facts: of the job.
        cluster: with at least `facts.world_size` devices, all alike.
        efficiency: how near to its peaks.

    Raises:
        ValueError: the device has no peak for a product's type.
    """
    known: dict[int, ChunkCost] = {}  # equal stages share one trace
    packed = {id(trace.ops): in_documents(trace, facts).ops for trace in traces.values()}
    traces = {at: replace(trace, ops=packed[id(trace.ops)]) for at, trace in traces.items()}
    traces_PV = [[traces[p, v] for v in range(facts.vp)] for p in range(facts.pp)]
    costs_PV = [[_known(known, t, facts, cluster, efficiency) for t in row] for row in traces_PV]
    schedule = schedule_of(facts)
    transfer = _transfer(traces_PV, facts, cluster, efficiency)
    forward_PVM, backward_PVM = _pass_seconds(costs_PV, schedule, facts, efficiency)
    run = simulate(schedule, forward_PVM, backward_PVM, transfer)
    steps_P = [step_cost(row, facts, cluster, efficiency) for row in traces_PV]
    ends_P = np.array([_end(run, p, steps_P[p], facts) for p in range(facts.pp)])
    last = int(ends_P.argmax())
    before = max(_gathering(run, p, steps_P[p], facts) for p in range(facts.pp))
    optimizer = max(step.optimizer + step.agree for step in steps_P)
    passes = {
        "forward": float(forward_PVM[last].sum()),
        "backward": float(backward_PVM[last].sum()),
    }
    parts = _parts(costs_PV[last], facts.micro_batches, sum(passes.values()))
    parts["bubble"] = max(0.0, float(run.end_P[last]) - sum(passes.values()))
    once = float(ends_P[last] - run.end_P[last]) + before
    parts["data parallel"] = parts.get("data parallel", 0.0) + once
    parts["optimizer"] = optimizer
    seconds = before + float(ends_P[last]) + optimizer
    memory_P = rank_memory(traces_PV, schedule, facts)
    fullest = max(memory_P, key=lambda memory: memory.peak)
    return Prediction(
        facts=facts,
        cluster=cluster,
        efficiency=efficiency,
        seconds=seconds,
        parts=parts,
        phases=_phases(costs_PV[last], facts.micro_batches),
        hidden=facts.micro_batches
        * sum(c.forward.hidden + c.backward.hidden for c in costs_PV[last]),
        last=last,
        run=run,
        costs_PV=costs_PV,
        memory_P=memory_P,
        collectives=[
            c
            for chunk, trace in enumerate(traces_PV[last])
            for c in trace.collectives
            if not (chunk and c.of_rank)
        ],
        executed_flops=facts.micro_batches
        * float(np.mean([sum(t.flops for t in row) for row in traces_PV])),
        gathering=before,
        reducing_P=[float(late) for late in ends_P - run.end_P],
        band=time_band(seconds, facts, efficiency.runs, efficiency.numbers),
        peak_band=memory_band(fullest, efficiency.memory_errors),
        host_P=[
            _with_copies(step.host, row, facts.micro_batches)
            for step, row in zip(steps_P, costs_PV, strict=True)
        ],
    )


def _known(
    known: dict[int, ChunkCost],
    trace: Trace,
    facts: JobFacts,
    cluster: Cluster,
    efficiency: Efficiency,
) -> ChunkCost:
    key = id(trace.ops)
    if key not in known:
        known[key] = chunk_cost(trace, facts, cluster, efficiency)
    return known[key]


def _with_copies(update: HostWork, chunks: Sequence[ChunkCost], micro_batches: int) -> HostWork:
    for chunk in chunks:
        for one in (chunk.forward, chunk.backward):
            update = update.plus(one.copies, micro_batches)
    return update


def _transfer(
    traces_PV: Sequence[Sequence[Trace]],
    facts: JobFacts,
    cluster: Cluster,
    efficiency: Efficiency,
) -> float:
    """Seconds of the largest send between stages; 0 without a pipeline."""
    sends = {c for row in traces_PV for t in row for c in t.collectives if c.kind == "send"}
    return max((collective_seconds(c, facts, cluster, efficiency) for c in sends), default=0.0)


def _pass_seconds(
    costs_PV: list[list[ChunkCost]],
    schedule: Schedule,
    facts: JobFacts,
    efficiency: Efficiency,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[P, V, M] seconds of every forward and backward.

    With `overlap_moe_expert_parallel_comm` a forward and a backward of the 1F1B phase run together,
    each one's expert-parallel communication beside the other's compute.
    """
    shape = (schedule.stages, schedule.chunks, schedule.micro_batches)
    forward, backward = np.zeros(shape), np.zeros(shape)
    for p, row in enumerate(costs_PV):
        for v, cost in enumerate(row):
            forward[p, v], backward[p, v] = cost.forward.seconds, cost.backward.seconds
        if facts.overlap_expert_parallel:
            for work in schedule.order(p):
                if work.steady:
                    one = row[work.chunk].forward if work.forward else row[work.chunk].backward
                    times = forward if work.forward else backward
                    times[p, work.chunk, work.micro_batch] = beside_seconds(one, row, efficiency)
    return forward, backward


def beside_seconds(one: PassCost, chunks: Sequence[ChunkCost], efficiency: Efficiency) -> float:
    """Seconds of a pass whose expert communication another pass of the stage hides."""
    both = [(c.forward, c.backward) for c in chunks]
    communication = sum(f.expert + b.expert for f, b in both)
    compute = sum(f.compute + b.compute for f, b in both)
    if not communication:
        return one.seconds
    share = min(1.0, compute / communication) * efficiency.hidden_share
    return one.with_expert(one.expert * (1 - share * (1 - efficiency.overlap_tax)))


def _end(run: PipelineRun, stage: int, step: StepCost, facts: JobFacts) -> float:
    """When a stage's gradients are reduced, from the first pass's start."""
    end = float(run.end_P[stage])
    if not facts.overlap_grad_reduce or not step.reduce_buckets:
        return end + step.reduce
    start = min(run.last_backward(stage, chunk).start for chunk in range(facts.vp))
    return end + exposed_communication(step.reduce, end - start, step.reduce_buckets)


def _gathering(run: PipelineRun, stage: int, step: StepCost, facts: JobFacts) -> float:
    """Seconds a stage's parameters delay the step; overlapped, its first passes hide the others."""
    if not facts.overlap_param_gather or not step.gather_buckets:
        return step.gather
    first = [e for e in run.events if e.stage == stage and e.work.forward][: facts.vp]
    window = sum(event.end - event.start for event in first)
    idle = first[0].start  # a later stage waits for its first micro-batch anyway
    return exposed_communication(step.gather, window, step.gather_buckets, idle)


def _parts(chunks: Sequence[ChunkCost], micro_batches: int, passes: float) -> dict[str, float]:
    """Seconds of all passes of a stage by what they are spent on; they add up to `passes`."""
    found: dict[str, float] = {"compute": 0.0, "expert parallel": 0.0}
    for chunk in chunks:
        for one in (chunk.forward, chunk.backward):
            found["compute"] += micro_batches * (one.compute + one.late)
            for group, seconds in one.exposed.items():
                name = "host copies" if group == "host" else f"{_group_name(group)} parallel"
                found[name] = found.get(name, 0.0) + micro_batches * seconds
    # What is left is dispatch and combine; what overlap costs compute is counted there, too.
    found["expert parallel"] = max(0.0, found["expert parallel"] + passes - sum(found.values()))
    return found


_GROUPS = {
    "tp": "tensor", "tp-cp": "tensor", "cp": "context", "ep": "expert", "etp": "expert tensor",
    "tp-ep": "expert tensor", "edp": "expert data", "dp-cp": "data", "world": "data",
}  # fmt: skip


def _group_name(group: str) -> str:
    if group not in _GROUPS and is_of_replicas(group):
        return "expert data" if "expert" in group else "data"
    return _GROUPS[group]


def _phases(chunks: Sequence[ChunkCost], micro_batches: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for chunk in chunks:
        for one in (chunk.forward, chunk.backward):
            for phase, seconds in one.by_phase.items():
                found[phase] = found.get(phase, 0.0) + micro_batches * seconds
            # What no kernel takes: waiting for launches, and what overlap costs.
            rest = one.compute + one.late - sum(one.by_phase.values())
            found[OTHER] = found.get(OTHER, 0.0) + micro_batches * rest
    return found
