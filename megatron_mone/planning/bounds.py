"""What a layout holds and takes at least, so that a search need not plan what cannot win.

Two bounds, both of the same composed step (composed.py):

1. Scaled: from units traced with small groups, before a layout's own is. Parameters are counted by
   what shards them; operations shrink with the tokens of a rank and run at the fitted peak of
   their class, with the most rows that the layout can give them; tensor- and expert-parallel
   traffic that nothing hides is priced on the layout's own groups.
2. Composed: from the unit of a layout's own sharding, all but exact: what is left out is what waits
   for what within the schedule, and what a step has once.

Memory that is called `held` (weights, gradients, optimizer, the CUDA context) and `peak` of the
second bound is never more than what the planner finds; `peak` of the first is an estimate.
May touch: the tracer's processes and cache, by way of the Composer.
Shapes: P stages, V chunks, S = P V virtual stages; K parts (kinds of layer, embedding, head, rest).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_mone.planning.composed import Composer, Sum, Unit, is_tied
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.host_cost import host_of
from megatron_mone.planning.cost.prediction import beside_seconds
from megatron_mone.planning.cost.rank_cost import (
    ChunkCost,
    PassCost,
    chunk_cost,
    collective_seconds,
    hideable_share,
    host_seconds,
    is_forward,
)
from megatron_mone.planning.cost.rank_memory import (
    COMMUNICATOR,
    CONTEXT,
    DEEPEP_BUFFERS,
    FRAGMENTATION,
    working_bytes,
)
from megatron_mone.planning.cost.roofline import Operation, operation
from megatron_mone.planning.job import FP32, NO_OFFLOAD, NO_RECOMPUTE, ON_HOST, JobSpec
from megatron_mone.planning.layout_axes import Axes, Pipeline, Shards, divisors, sized
from megatron_mone.planning.planner import Planner
from megatron_mone.planning.stage_split import (
    Shape,
    Split,
    balanced_split,
    even_split,
    held_micro_batches,
    least_seconds,
    split_stages,
)
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import DEVICE_WAIT, Collective, StageMemory, Trace

Numbers = NDArray[np.float64]
_WITHOUT_PADDING = 0.98
"""Of the optimizer's state, whose shards are padded, and rounded where they are scaled."""
SURE_OF_ACTIVATIONS = 0.97
"""Of activations as they are scaled, what a layout keeps at least; what holds them whole on each
rank, or twice, as expert tensor parallelism does, makes it more."""
SURE_OF_LAUNCHES = 0.95
"""Of the host's time as it is put together, what it takes at least: tensor parallelism adds other
launches beside recomputed modules."""
_BIG = 1 << 16  # bytes of an exchange of tokens, not of their counts


@dataclass(frozen=True)
class Bound:
    """At least, of one layout.

    Attributes:
        seconds: of a step.
        held: bytes of the fullest stage from step to step, and of its process.
        peak: bytes of the fullest stage at its fullest.
    """

    seconds: float
    held: float
    peak: float


@dataclass(frozen=True)
class Model:
    """What all layouts share.

    Attributes:
        job: any of its layouts.
        facts: of any layout.
        kinds: of its decoder layers, in order.
        mtp: multi-token-prediction layers.
        gpus: W.
    """

    job: JobSpec
    facts: JobFacts
    kinds: tuple[str, ...]
    mtp: int
    gpus: int

    @property
    def parts(self) -> tuple[str, ...]:
        """[K] of which stages are put together."""
        return (*sorted(set(self.kinds)), "embedding", "head", "rest")

    def contents(self, split: Split) -> Numbers:
        """[S, K] how many of each part a virtual stage holds."""
        edges = np.concatenate([[0], np.cumsum(split)])
        found = np.zeros((len(split), len(self.parts)))
        for column, kind in enumerate(self.parts[:-3]):
            upto = np.concatenate([[0], np.cumsum([one == kind for one in self.kinds])])
            found[:, column] = upto[edges[1:]] - upto[edges[:-1]]
        found[0, -3] = found[-1, -2] = 1
        found[:, -1] = 1
        return found


def shape_of(shards: Shards, pipeline: Pipeline, model: Model) -> Shape:
    """The schedule of a layout."""
    facts = sized(model.facts, shards, pipeline, model.gpus)
    return Shape(pipeline.pp, pipeline.vpp, facts.micro_batches, pipeline.pp)


@dataclass(frozen=True)
class _Held:
    """[K] bytes of each part on one rank, and of its optimizer as if no replicas shared it."""

    dense: Numbers
    expert: Numbers
    dense_state: Numbers
    expert_state: Numbers

    @classmethod
    def of(cls, unit: Unit, parts: Sequence[str]) -> _Held:
        facts = unit.facts
        replicas = facts.world_size // facts.tp
        copies = facts.world_size // (facts.ep * facts.etp)

        def column(name: str) -> Numbers:
            return np.array([unit.parts[part].memory[name] for part in parts])

        expert = column("expert_weights") + column("expert_gradients")
        state = column("expert_optimizer")
        return cls(
            column("weights") + column("gradients") - expert,
            expert,
            (column("optimizer") - state) * _sharing(facts, replicas),
            state * _sharing(facts, copies),
        )


def _sharing(facts: JobFacts, replicas: int) -> int:
    """How many replicas share a piece of the optimizer's state."""
    if not facts.distributed_optimizer:
        return 1
    return max(1, replicas // facts.num_distributed_optimizer_instances)


@dataclass(frozen=True)
class _Ops:
    """Operators of one part and pass: how often each, and seconds of the host that launches them.

    Attributes:
        counts: operation -> how many, some of them negative (composed.py).
        host: seconds, but for
        groups: seconds of products that are launched expert by expert.
        waits: seconds of both, host and device.
    """

    counts: Counter[Operation]
    host: float
    groups: float
    waits: float

    @classmethod
    def of(cls, part: Sum, forward: bool, facts: JobFacts, efficiency: Efficiency) -> _Ops:
        counts: Counter[Operation] = Counter()
        host = groups = waits = 0.0
        for op, count in part.ops.items():
            if op.of_step or is_forward(op) != forward:
                continue
            counts[operation(op)] += count
            if op.name == DEVICE_WAIT:
                waits += count * efficiency.wait_seconds
            elif op.phase not in facts.graphed and op.name.startswith("fused.grouped_gemm"):
                groups += count * host_seconds(op, efficiency)
            elif op.phase not in facts.graphed:
                host += count * host_seconds(op, efficiency)
        for one, count in part.collectives.items():
            is_launched = one.of_micro_batch and one.group != "pp"
            if is_launched and one.phase not in facts.graphed and is_forward(one) == forward:
                host += count * efficiency.kernel_seconds
        left = Counter({one: count for one, count in counts.items() if count})
        return cls(left, host, groups, waits)


class Scaled:
    """The first bound: of any layout, from units of small groups.

    Args:
        composer: of the planner.
        planner: of the cluster.
        model: of the job.
        recomputes: that layouts may have, "none" first.

    Raises:
        ValueError: one line; Megatron refuses the model in the smallest groups.
        RuntimeError: one line; a trace failed.
    """

    def __init__(
        self,
        composer: Composer,
        planner: Planner,
        model: Model,
        recomputes: Sequence[str],
    ) -> None:
        self._cluster, self._efficiency = planner.cluster, planner.efficiency
        self.model = model
        experts = model.facts.num_experts
        # At ep = 1 Megatron keeps experts among the rest (`_set_expert_parameter_attributes`).
        ep = next((ep for ep in divisors(experts) if ep > 1), 1) if experts else 1
        self._base = Shards(1, 1, ep, 1, 1)
        self._composer = composer
        self._units: dict[str, Unit] = {NO_RECOMPUTE: self._unit(self._base)}
        for recompute in recomputes[1:]:
            with suppress(ValueError):  # refused in small groups, and perhaps not in others
                self._units[recompute] = self._unit(replace(self._base, recompute=recompute))
        parts = model.parts
        self._state_units: dict[str, Unit | None] = {FP32: self._units[NO_RECOMPUTE]}
        self._held = {FP32: _Held.of(self._units[NO_RECOMPUTE], parts)}
        self._over_tensor: Unit | None = None
        with suppress(ValueError):
            self._over_tensor = self._unit(replace(self._base, tp=2, etp=1))
        self._sharded = self._share_by_tensor()
        self._ops = {
            (name, forward): [
                _Ops.of(unit.parts[part], forward, model.facts, self._efficiency) for part in parts
            ]
            for name, unit in self._units.items()
            for forward in (True, False)
        }
        self._more_host = {forward: self._host_over_tensor(forward) for forward in (True, False)}
        self._known: dict[tuple[Shards, bool], Numbers] = {}
        self._splits: dict[tuple[object, ...], Split] = {}

    def bound(self, shards: Shards, pipeline: Pipeline) -> Bound:
        """Of a layout."""
        shape = shape_of(shards, pipeline, self.model)
        seconds = least_seconds(shape, *self._passes(shards, pipeline.pp, pipeline.split))
        seconds += self.update_seconds(shards, pipeline)
        n_SK = self.model.contents(pipeline.split)
        held_P = self._held_bytes(shards, pipeline.pp, n_SK)
        kept_S, working_S = self._activations(shards, n_SK)
        kept_PV = kept_S.reshape(-1, pipeline.pp).T
        working_P = working_S.reshape(-1, pipeline.pp)[-1]
        moving_P = (held_micro_batches(shape) * kept_PV).sum(1) + working_P
        peak_P = held_P + (1 + FRAGMENTATION) * SURE_OF_ACTIVATIONS * moving_P
        # The ranks that share a micro-batch, at least.
        peak_P += COMMUNICATOR * ((shards.tp > 1) + (shards.cp > 1) + (shards.ep > 1))
        return Bound(seconds, float(held_P.max()), float(peak_P.max()))

    def takes(self, state: str) -> bool:
        """Whether Megatron takes the model with such a state.

        Args:
            state: of STATES.

        Raises:
            RuntimeError: one line; a trace failed.
        """
        if state not in self._state_units:
            self._state_units[state] = None
            with suppress(ValueError):
                unit = self._unit(replace(self._base, state=state))
                self._state_units[state], self._held[state] = unit, _Held.of(unit, self.model.parts)
        return self._state_units[state] is not None

    def update_seconds(self, shards: Shards, pipeline: Pipeline) -> float:
        """Of the optimizer, where the host makes it: it reads and writes all of its state.

        Of the device's optimizer nothing is counted.
        """
        if shards.state != ON_HOST:
            return 0.0
        n_SK = self.model.contents(pipeline.split)
        held = replace(shards, state=FP32)
        state_P = self._stage_bytes(held, pipeline.pp, n_SK, weights=0.0)
        host = host_of(self._cluster)
        return 2 * float(state_P.max()) / (host.memory_bandwidth * host.efficiency)

    def of_state(self, state: str) -> tuple[float, float]:
        """Bytes of gradients and of the optimizer over those of the job's own state, at least."""
        own, other = self._state_units[FP32], self._state_units[state]
        assert own is not None
        assert other is not None
        shares = []
        for name in ("gradients", "optimizer"):
            shares.append(
                min(
                    other.parts[part].memory[name] / own.parts[part].memory[name]
                    for part in self.model.parts
                    if own.parts[part].memory[name] > _BIG
                )
            )
        return shares[0], shares[1]

    def pipelines(self, shards: Shards, pp: int, vpp: int) -> list[Pipeline]:
        """Megatron's even split, if there is one, and the balanced one, if it is another.

        Args:
            shards: of a layer.
            pp, vpp: P and V.
        """
        layers = len(self.model.kinds)
        even = even_split(layers, pp, vpp)
        found = [] if even is None else [Pipeline(pp, vpp, even, True)]
        if pp == 1:
            return found
        probe = Pipeline(pp, vpp, (layers,), False)
        shape = shape_of(shards, probe, self.model)
        # Splits differ by what the parts take, one beside another.
        weights_K = self._seconds(shards, True).max(0) + self._seconds(shards, False).max(0)
        key = (pp, vpp, shape.micro_batches, *np.round(weights_K / weights_K.max(), 1))
        if key not in self._splits:
            self._splits[key] = balanced_split(
                layers, shape, lambda split: self._passes(shards, pp, split)
            )
        if self._splits[key] != even:
            found.append(Pipeline(pp, vpp, self._splits[key], False))
        return found

    def _unit(self, shards: Shards) -> Unit:
        return unit_of(self._composer, self.model, shards)

    def _passes(self, shards: Shards, stages: int, split: Split) -> tuple[Numbers, Numbers]:
        """[P, V] seconds of one micro-batch's forward and backward."""
        n_SK = self.model.contents(split)
        forward_S, backward_S = (
            np.maximum(n_SK @ (device_K + communication_K), n_SK @ host_K)
            for device_K, host_K, communication_K in map(
                self._seconds, (shards, shards), (True, False)
            )
        )
        return (
            forward_S.clip(0).reshape(-1, stages).T, backward_S.clip(0).reshape(-1, stages).T
        )  # fmt: skip

    def _seconds(self, shards: Shards, forward: bool) -> Numbers:
        """[3, K] of the device, of the host and of communication; neither the state counts nor
        copies of activations."""
        plain = replace(shards, state=FP32, offload=NO_OFFLOAD)
        if (plain, forward) not in self._known:
            recompute = shards.recompute if shards.recompute in self._units else NO_RECOMPUTE
            ops_K = self._ops[recompute, forward]
            device_K = [
                ops.waits
                + sum(
                    count * self._device_seconds(self._scaled(one, shards))
                    for one, count in ops.counts.items()
                )
                for ops in ops_K
            ]
            fewer = self._base.ep / shards.ep  # experts of a rank
            host_K = np.array([ops.host + ops.waits + fewer * ops.groups for ops in ops_K])
            if shards.tp > 1:
                host_K += self._more_host[forward]
            host_K *= SURE_OF_LAUNCHES
            communication_K = self._communication(shards, recompute, forward)
            self._known[plain, forward] = np.array([device_K, host_K, communication_K])
        return self._known[plain, forward]

    def _device_seconds(self, one: Operation) -> float:
        return self._efficiency.curves[one.kind].seconds(one, self._cluster.device)

    def _host_over_tensor(self, forward: bool) -> Numbers:
        """[K] seconds that the host takes longer where there is tensor parallelism."""
        if self._over_tensor is None:
            return np.zeros(len(self.model.parts))
        plain = [ops.host for ops in self._ops[NO_RECOMPUTE, forward]]
        found = [
            _Ops.of(self._over_tensor.parts[part], forward, self.model.facts, self._efficiency).host
            for part in self.model.parts
        ]
        return np.array(found) - np.array(plain)

    def _scaled(self, one: Operation, shards: Shards) -> Operation:
        """An operation of the smallest groups, in others: no more work or rows than it can have."""
        ranks = shards.tp * shards.cp
        tokens = shards.mbs / ranks
        # Rows of a product, or what the product of a weight's gradient sums over.
        more = float(shards.mbs)
        moved = 1 / ranks if one.flops else tokens  # weights do not grow with the micro-batch
        if one.kind == "grouped_gemm":
            more *= shards.ep / self._base.ep * shards.etp / ranks
            moved = min(moved, self._base.ep / (shards.ep * shards.etp))
        if one.kind in ("gemm", "grouped_gemm") and more > 1:
            one = replace(one, rows=one.rows * more, depth=math.ceil(one.depth * more))
        return replace(one, flops=one.flops * tokens, bytes=one.bytes * moved)

    def _communication(self, shards: Shards, recompute: str, forward: bool) -> Numbers:
        """[K] seconds of tensor- and expert-parallel traffic that nothing hides."""
        found = np.zeros(len(self.model.parts))
        for column, part in enumerate(self.model.parts):
            moved: list[tuple[Collective, int]] = []
            if shards.tp > 1 and self._over_tensor is not None:
                for one, count in self._over_tensor.parts[part].collectives.items():
                    if one.group == "tp" and one.of_micro_batch:
                        size = one.bytes * shards.mbs / shards.cp
                        size *= 2 / shards.tp if one.kind == "all_gather" else 1
                        moved.append(
                            (replace(one, bytes=round(size), ranks=shards.tp, stride=1), count)
                        )
            if not self.model.facts.overlap_expert_parallel:
                for one, count in self._units[recompute].parts[part].collectives.items():
                    moved += [(each, count) for each in _exchanges(one, shards)]
            for one, count in moved:
                if is_forward(one) == forward:
                    share = hideable_share(one, self.model.facts, 1)
                    seconds = collective_seconds(
                        one, self.model.facts, self._cluster, self._efficiency
                    )
                    exposed = 1 - share * self._efficiency.hidden_share
                    found[column] += count * exposed * seconds
        return found

    def _share_by_tensor(self) -> Numbers:
        """[K] share of the bytes of what is no expert that tensor parallelism divides."""
        whole = self._held[FP32].dense
        if self._over_tensor is None:
            return np.ones_like(whole)  # at most
        halves = _Held.of(self._over_tensor, self.model.parts).dense
        return np.clip(2 * (1 - halves / np.maximum(whole, 1)), 0, 1)

    def _held_bytes(self, shards: Shards, stages: int, n_SK: Numbers) -> Numbers:
        """[P]"""
        return self._stage_bytes(shards, stages, n_SK, weights=1.0) + CONTEXT

    def _stage_bytes(self, shards: Shards, stages: int, n_SK: Numbers, weights: float) -> Numbers:
        """[P] of the optimizer, and of so large a share of weights and gradients."""
        facts, held = self.model.facts, self._held[shards.state]
        dense = self._sharded / shards.tp + 1 - self._sharded
        expert = self._base.ep / (shards.ep * shards.etp)
        if self._base.ep == 1:  # experts are among the rest
            dense = np.minimum(dense, 1 / (shards.ep * shards.etp))
        replicas = _sharing(facts, self.model.gpus // (shards.tp * stages))
        copies = _sharing(facts, self.model.gpus // (shards.ep * shards.etp * stages))
        if self._base.ep == 1:
            replicas = max(replicas, copies)
        held_K = weights * (dense * held.dense + expert * held.expert)
        state_K = dense * held.dense_state / replicas + expert * held.expert_state / copies
        bytes_S = n_SK @ (held_K + _WITHOUT_PADDING * state_K)
        if stages == 1 and is_tied(self.model.job):
            # The head's weights are the embedding's.
            bytes_S -= (held_K + state_K)[-3]
        return np.asarray(bytes_S.reshape(-1, stages).sum(0))

    def _activations(self, shards: Shards, n_SK: Numbers) -> tuple[Numbers, Numbers]:
        """[S] bytes that a micro-batch keeps, and that live beside them, by its tokens."""
        unit = self._units.get(shards.recompute)
        if unit is None or shards.offload != NO_OFFLOAD:
            return np.zeros(len(n_SK)), np.zeros(len(n_SK))
        tokens = shards.mbs / (shards.tp * shards.cp)
        kept_S, forward_S, backward_S = (
            tokens * n_SK @ np.array([unit.parts[part].memory[name] for part in self.model.parts])
            for name in ("activations", "forward_peak", "backward_peak")
        )
        return kept_S, np.maximum(np.maximum(forward_S, backward_S) - kept_S, 0)


def _exchanges(one: Collective, shards: Shards) -> list[Collective]:
    """What a layout's expert parallelism makes of an exchange of the smallest groups."""
    if one.group not in ("ep", "tp-ep") or not one.of_micro_batch or one.bytes < _BIG:
        return []
    size = round(one.bytes * shards.mbs / (shards.tp * shards.cp))
    found = []
    if shards.ep > 1 and one.group == "ep":
        found.append(replace(one, bytes=size, ranks=shards.ep, stride=shards.etp))
    if shards.etp > 1 and one.kind == "all_to_all":
        tensor = replace(one, group="etp", ranks=shards.etp, stride=1, bytes=size)
        found.append(replace(tensor, kind="all_gather"))
    return found


def unit_of(composer: Composer, model: Model, shards: Shards) -> Unit:
    """The unit of a sharding.

    Raises:
        ValueError: one line; Megatron refuses it.
        RuntimeError: one line; a trace failed.
    """
    facts = sized(model.facts, shards, Pipeline(1, 1, (len(model.kinds),), True), model.gpus)
    return composer.unit(model.job.with_layout(shards.fields), facts, model.kinds)


class Composed:
    """The second bound: of all layouts of one sharding, from its unit.

    Args:
        unit: of the sharding.
        shards: that it is of.
        model: of the job.
        cluster, efficiency: of the planner.
    """

    def __init__(
        self, unit: Unit, shards: Shards, model: Model, cluster: Cluster, efficiency: Efficiency
    ) -> None:
        self._unit, self._shards, self._model = unit, shards, model
        self._cluster, self._efficiency = cluster, efficiency
        self._costs: dict[tuple[str, int], ChunkCost] = {}
        self._traces: dict[tuple[str, int], Trace] = {}

    def bound(self, pipeline: Pipeline, gradients: float = 1.0, optimizer: float = 1.0) -> Bound:
        """Of a layout.

        Args:
            pipeline: of it.
            gradients, optimizer: share of their bytes that is left in another precision.
        """
        model, shards, stages = self._model, self._shards, pipeline.pp
        facts = sized(model.facts, shards, pipeline, model.gpus)
        keys = self._keys(pipeline.split)
        shape = Shape(stages, pipeline.vpp, facts.micro_batches, stages)
        seconds = least_seconds(shape, *self.passes(pipeline.split, facts))
        memory_PV = [
            [self._trace(key, stages).memory for key in keys[stage::stages]]
            for stage in range(stages)
        ]
        shares = gradients, _WITHOUT_PADDING * optimizer
        held_P = np.array([self._held(chunks, facts, *shares) for chunks in memory_PV]) + CONTEXT
        kept_PV = np.array([[one.activations for one in chunks] for chunks in memory_PV])
        moving_P = (held_micro_batches(shape) * kept_PV).sum(1)
        # As the first backward of 1F1B begins, which is the last chunk's.
        working_P = np.array([working_bytes(chunks[-1]) for chunks in memory_PV])
        peak_P = held_P + (1 + FRAGMENTATION) * (moving_P + working_P)
        peak_P += [self._buffers(keys[stage::stages], facts) for stage in range(stages)]
        return Bound(seconds, float(held_P.max()), float(peak_P.max()))

    def passes(self, split: Split, facts: JobFacts) -> tuple[Numbers, Numbers]:
        """[P, V] least seconds of one micro-batch's forward and backward.

        Args:
            split: of the layers.
            facts: of the job.
        """
        keys, stages = self._keys(split), facts.pp
        costs_PV = [
            [self._cost(key, facts) for key in keys[stage::stages]] for stage in range(stages)
        ]

        def least(one: PassCost, row: Sequence[ChunkCost]) -> float:
            if not facts.overlap_expert_parallel:
                return one.seconds
            return min(one.seconds, beside_seconds(one, row, self._efficiency))

        return (
            np.array([[least(cost.forward, row) for cost in row] for row in costs_PV]),
            np.array([[least(cost.backward, row) for cost in row] for row in costs_PV]),
        )

    def _keys(self, split: Split) -> list[str]:
        return [one.key for one in split_stages(split, self._model.kinds, self._model.mtp)]

    def _buffers(self, keys: Sequence[str], facts: JobFacts) -> float:
        groups = {
            one.group
            for key in keys
            for one in self._trace(key, facts.pp).collectives
            if one.of_micro_batch and one.ranks > 1
        }
        deepep = DEEPEP_BUFFERS if facts.dispatcher.startswith("flex") else 0
        return float(COMMUNICATOR * len(groups) + deepep)

    def _trace(self, key: str, stages: int) -> Trace:
        stages = min(stages, 2)  # first and last are the same stage, or are not
        if (key, stages) not in self._traces:
            gpus = self._unit.facts.world_size * stages
            self._traces[key, stages] = self._unit.trace(key, gpus, stages)
        return self._traces[key, stages]

    def _cost(self, key: str, facts: JobFacts) -> ChunkCost:
        place = key, min(facts.pp, 2)
        if place not in self._costs:
            trace = self._trace(key, facts.pp)
            self._costs[place] = chunk_cost(trace, facts, self._cluster, self._efficiency)
        return self._costs[place]

    def _held(
        self, chunks: Sequence[StageMemory], facts: JobFacts, gradients: float, optimizer: float
    ) -> float:
        """Bytes of a stage; more replicas share the optimizer's state than the unit job has."""
        shard = self._unit.facts.world_size * facts.pp / facts.world_size
        state = shard if facts.distributed_optimizer else 1.0
        return sum(
            one.weights + gradients * one.gradients + optimizer * state * one.optimizer
            for one in chunks
        )


class Bounds:
    """Both bounds of every layout of a job.

    Args:
        composer, planner, model: as of Scaled.
        axes: all there are.

    Raises:
        ValueError, RuntimeError: as Scaled.
    """

    def __init__(
        self,
        composer: Composer,
        planner: Planner,
        model: Model,
        axes: Axes,
    ) -> None:
        self._composer, self._planner, self._model = composer, planner, model
        self._scaled = Scaled(composer, planner, model, axes.recomputes)
        self.every = axes
        self._composed: dict[Shards, Composed] = {}

    def axes(self, allowed: Collection[str]) -> Axes:
        """Those of a user who allows so much, and whose states Megatron takes.

        Args:
            allowed: of ALLOWABLE.

        Raises:
            RuntimeError: one line; a trace failed.
        """
        axes = self.every.within(allowed)
        return replace(axes, states=tuple(filter(self._scaled.takes, axes.states)))

    def pipelines(self, shards: Shards, pp: int, vpp: int) -> list[Pipeline]:
        """Splits of the layers over P stages of V chunks."""
        return self._scaled.pipelines(shards, pp, vpp)

    def first(self, shards: Shards, pipeline: Pipeline) -> Bound:
        """Of a layout, before its sharding is traced."""
        return self._scaled.bound(shards, pipeline)

    def second(self, shards: Shards, pipeline: Pipeline) -> Bound:
        """Of a layout whose sharding is traced for it, if it was not for another.

        Raises:
            ValueError: one line; Megatron refuses the sharding.
            RuntimeError: one line; a trace failed.
        """
        plain = replace(shards, state=FP32)  # another's passes are the same
        if plain not in self._composed:
            unit = unit_of(self._composer, self._model, plain)
            self._composed[plain] = Composed(
                unit, plain, self._model, self._planner.cluster, self._planner.efficiency
            )
        bound = self._composed[plain].bound(pipeline, *self._scaled.of_state(shards.state))
        update = self._scaled.update_seconds(shards, pipeline)
        return replace(bound, seconds=bound.seconds + update)
