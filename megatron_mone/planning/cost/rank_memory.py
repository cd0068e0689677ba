"""Bytes that one rank needs at its fullest moment, and the first that do not fit its device.

Weights, gradients, optimizer and what a micro-batch keeps are the trace's; how many micro-batches
are in flight is the schedule's. What no trace shows stands apart, as ALLOWANCES: assumptions.
May touch: nothing.
Shapes: P stages, V chunks of a stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mone.common.device import Device
from megatron_mone.common.phases import FORWARD
from megatron_mone.planning.cost.host_cost import host_work
from megatron_mone.planning.cost.pipeline import Schedule, peak_activations
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import StageMemory, Trace

MIB = 2**20
# Assumptions. A NCCL ring holds 16 channels, each with buffers of its three protocols of some 9 MiB
# (NCCL_BUFFSIZE is 4 MiB); DeepEP's buffers for NVLink and RDMA are of about a GiB; a process that
# has loaded torch's, NCCL's and Transformer Engine's kernels and cuBLAS's work spaces holds a GiB;
# an allocator with expandable segments wastes a few percent of what comes and goes.
COMMUNICATOR = 16 * 9 * MIB
DEEPEP_BUFFERS = 1024 * MIB
CONTEXT = 1024 * MIB
FRAGMENTATION = 0.03

ORDER = (
    "weights", "gradients", "optimizer", "activations", "transient", "buffers", "context",
    "fragmentation",
)  # fmt: skip


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer: from step to step.
        activations: kept for backward by all micro-batches in flight.
        transient: more, while a pass runs.
        buffers: of communication: transfers between stages, NCCL, DeepEP.
        context: of the CUDA process.
        fragmentation: of activations and transient bytes.
        host: in the host's memory; none of the device's.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    buffers: float
    context: float
    fragmentation: float
    host: float = 0.0

    @property
    def peak(self) -> float:
        """All of the device's."""
        return sum(getattr(self, name) for name in ORDER)

    @property
    def allocated(self) -> float:
        """What torch's allocator holds for tensors: no context, library buffers, fragmentation."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient

    def first_that_does_not_fit(self, device: Device) -> str | None:
        """The name of the part at which a running total in ORDER passes the device's memory."""
        total = 0.0
        for name in ORDER:
            total += getattr(self, name)
            if total > device.memory_bytes:
                return name
        return None


def rank_memory(
    traces_PV: Sequence[Sequence[Trace]], schedule: Schedule, facts: JobFacts
) -> list[RankMemory]:
    """[P] memory of a rank of each stage.

    Args:
        traces_PV: of one micro-batch in each chunk.
        schedule: of the step.
        facts: of the job.
    """
    kept_PV = [[t.memory.activations for t in chunks] for chunks in traces_PV]
    working_PV = [[working_bytes(t.memory) for t in chunks] for chunks in traces_PV]
    peaks_P = peak_activations(schedule, kept_PV, working_PV)
    idle_P = peak_activations(schedule, kept_PV, 0.0)
    on_host_P = peak_activations(schedule, [[_on_host(t) for t in row] for row in traces_PV], 0.0)
    return [
        _rank(chunks, float(idle), float(peak - idle), float(on_host), facts)
        for chunks, idle, peak, on_host in zip(traces_PV, idle_P, peaks_P, on_host_P, strict=True)
    ]


def _on_host(trace: Trace) -> float:
    """Bytes of one micro-batch's activations there, from its forward pass to its backward one."""
    return host_work(op for op in trace.ops if op.pass_ == FORWARD and not op.of_step).to_host


def working_bytes(memory: StageMemory) -> int:
    """Bytes beside what is kept while a pass runs."""
    return max(0, max(memory.forward_peak, memory.backward_peak) - memory.activations)


def _rank(
    chunks: Sequence[Trace],
    activations: float,
    transient: float,
    on_host: float,
    facts: JobFacts,
) -> RankMemory:
    groups = {c.group for trace in chunks for c in trace.collectives if c.ranks > 1}
    received = [c.bytes for trace in chunks for c in trace.collectives if c.kind == "recv"]
    buffers = COMMUNICATOR * len(groups) + 2 * max(received, default=0)
    if facts.dispatcher.startswith("flex"):
        buffers += DEEPEP_BUFFERS
    return RankMemory(
        weights=sum(trace.memory.weights for trace in chunks),
        gradients=sum(trace.memory.gradients for trace in chunks),
        optimizer=sum(trace.memory.optimizer for trace in chunks),
        activations=activations,
        transient=transient,
        buffers=buffers,
        context=CONTEXT,
        fragmentation=FRAGMENTATION * (activations + transient),
        host=on_host + sum(trace.memory.host_optimizer for trace in chunks),
    )
