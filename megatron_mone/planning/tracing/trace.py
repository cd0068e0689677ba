"""What one rank of a job executes, sends and keeps: the record that the cost model reads.

A trace is of one step, not the first of its run, with the fewest micro-batches that the schedule
takes, forward to optimizer.
Kept as JSON, schema "megatron-mone/trace/1". Touches the files it is given, nothing else.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import StrictBool

from megatron_mone.common.checked_json import Fault, Field, load
from megatron_mone.common.documents import Kind, Text, Whole, record_of
from megatron_mone.common.files import atomic_write
from megatron_mone.common.phases import GRAD_REDUCE, OPTIMIZER
from megatron_mone.profiling.rank_record import PassName, Phase

SCHEMA = "megatron-mone/trace/1"
_FIX = "trace the rank again"

FUNCTION_NODE, NODE, DEVICE_WAIT = "autograd.function", "autograd.node", "wait.device"
"""Ops of the host alone, without tensors: a node of autograd whose code is Python's, one in C++
(each as it is made and again as it runs), and a wait until the device has caught up."""

# Groups whose ranks work on one micro-batch together.
_PER_MICRO_BATCH = ("tp", "cp", "tp-cp", "ep", "etp", "tp-ep", "pp")
# Groups of several stages, over which a rank agrees on norms, faults and losses.
_PER_RANK = ("mp", "world", "intra_distributed_optimizer_instance_group")
_PER_STEP = (GRAD_REDUCE, OPTIMIZER)

# Names of copies between device and host, and what those of the host's operators begin with.
TO_HOST, TO_DEVICE, HOST = "link.to_host", "link.to_device", "host."

Shape = tuple[Whole, ...]


def _layer(key: str) -> int:
    if not key.isdecimal():
        raise Fault(f"{key!r} is not the number of a layer")
    return int(key)


Layer = Annotated[int, Kind("number of a layer", _layer)]
"""1-based, as a key of a JSON object."""


@dataclass(frozen=True)
class Op:
    """Equal operators that ran one after another.

    Attributes:
        name: "aten.mm", or of MoNE's routed experts "mone.gate", "mone.up_down" and
            "mone.up_down_backward" on CPU ranks, "mone." and a kernel's name on GPUs; TO_HOST,
            TO_DEVICE, or of the host's tensors HOST and its own. Nodes and waits (FUNCTION_NODE and
            its like) stand behind the others, in no order.
        inputs, outputs: shapes of its tensors; of in-place operators the tensor is in both.
        dtype: of the first output.
        bytes_read, bytes_written: of one; its tensors once, whole.
        flops: of one; products alone, two operations a multiply-add.
        phase, pass_: of profiling.phases.
        count: how many.
    """

    name: Text
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    dtype: Text
    bytes_read: Whole
    bytes_written: Whole
    flops: Whole
    phase: Phase
    pass_: PassName
    count: Whole = 1

    @property
    def of_step(self) -> bool:
        """Whether every step has it once, not every micro-batch."""
        return self.phase in _PER_STEP

    @property
    def of_device(self) -> bool:
        """Whether the device's processors run it."""
        return not self.name.startswith((HOST, TO_HOST, TO_DEVICE))


@dataclass(frozen=True)
class Collective:
    """Equal collectives that were launched one after another.

    Attributes:
        kind: all_reduce, all_gather, ...; as profiling.communication names them.
        bytes: that this rank puts in, of one; of a recv, that arrive.
        group: "tp", "ep", ... of communication.GROUP_NAMES.
        ranks: in the group.
        stride: from the group's first rank to its second, by number in the job.
        phase, pass_: in which it was launched.
        count: how many.
        in_pass: of a step that DeepSpeed makes, whether it was launched within a pass; None where
            Megatron makes it, whose groups and phases tell.
    """

    kind: Text
    bytes: Whole
    group: Text
    ranks: Whole
    stride: Whole
    phase: Phase
    pass_: PassName
    count: Whole = 1
    in_pass: StrictBool | None = None

    @property
    def of_micro_batch(self) -> bool:
        """Whether every micro-batch has it, not every step once."""
        if self.in_pass is not None:
            return self.in_pass
        if self.phase in _PER_STEP:
            return False
        # Replicas of experts add up loads for the balance loss; their gradients have a phase.
        return self.group in _PER_MICRO_BATCH or (self.group, self.kind) == ("edp", "all_reduce")

    @property
    def of_rank(self) -> bool:
        """Whether a rank has it once a step, however many chunks it holds: norms and flags."""
        return self.group in _PER_RANK


@dataclass(frozen=True)
class StageMemory:
    """Bytes that the rank holds.

    Attributes:
        weights, gradients, optimizer: from step to step, as profiling.ledger tells them apart.
        activations: that autograd keeps for backward after the forward of all micro-batches of the
            trace, every storage once, weights left out.
        forward_peak, backward_peak: the most that tensors made in the step hold at once in its
            forward and backward passes, activations included, and what stands beside them from the
            first step on (Transformer Engine's dummy gradients).
        expert_weights, expert_gradients, expert_optimizer: those of routed experts, contained in
            the first three.
        host_optimizer: of the optimizer, in the host's memory; in none of the others.
    """

    weights: Whole
    gradients: Whole
    optimizer: Whole
    activations: Whole
    forward_peak: Whole = 0
    backward_peak: Whole = 0
    expert_weights: Whole = 0
    expert_gradients: Whole = 0
    expert_optimizer: Whole = 0
    host_optimizer: Whole = 0


@dataclass(frozen=True)
class Trace:
    """One step of one rank.

    Attributes:
        world_size, rank: of the job.
        micro_batches: in the step traced: 1, or as many as an interleaved schedule needs.
        backend: of the routed experts, whose products are counted; see live_run.experts_backend.
        rows: {layer, 1-based: routed rows of this rank's experts}.
        ops, collectives: in the order in which they ran, those of the host alone last.
        memory: of the rank.
    """

    world_size: Whole
    rank: Whole
    micro_batches: Whole
    backend: Text
    rows: dict[Layer, Whole]
    ops: tuple[Op, ...]
    collectives: tuple[Collective, ...]
    memory: StageMemory

    @property
    def flops(self) -> int:
        """Of all ops."""
        return sum(op.flops * op.count for op in self.ops)

    def traffic(self) -> dict[str, tuple[int, int]]:
        """ "kind group" -> (calls, bytes sent), as the profiler adds them up."""
        from megatron_mone.profiling.communication import sent_bytes  # imports torch

        found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for one in self.collectives:
            calls, sent = found[f"{one.kind} {one.group}"]
            size = round(sent_bytes(one.kind, one.bytes, one.ranks))
            found[f"{one.kind} {one.group}"] = calls + one.count, sent + size * one.count
        return dict(found)

    def write(self, path: Path) -> None:
        """Write the trace as JSON."""
        document = {"schema": SCHEMA, **asdict(self)}
        atomic_write(path, (json.dumps(document, separators=(",", ":")) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a trace.

        Raises:
            ValueError: one line that names the file, the place and what is wrong there.
        """
        document = load(path, _FIX)
        Field(document, path, _FIX).has_schema(SCHEMA)
        return record_of(cls, document, path, _FIX)


def merged[Record: (Op, Collective)](records: Iterable[Record]) -> tuple[Record, ...]:
    """Equal neighbours as one, their counts added."""
    found: list[Record] = []
    for record in records:
        if found and replace(found[-1], count=record.count) == record:
            found[-1] = replace(record, count=found[-1].count + record.count)
        else:
            found.append(record)
    return tuple(found)
