"""Seconds of the passes of any layout, at least, scaled from units of small groups.

Operations shrink with the tokens of a rank and run at the fitted peak of their class, with the most
rows that the layout can give them; tensor- and expert-parallel traffic that nothing hides is priced
on the layout's own groups. Touches nothing.
Shapes: P stages, V chunks, S = P V virtual stages; K parts (kinds of layer, embedding, head, rest).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from megatron_mone.planning.composed import Sum
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.rank_cost import (
    collective_seconds,
    hideable_share,
    host_seconds,
    is_forward,
)
from megatron_mone.planning.cost.roofline import Operation, operation
from megatron_mone.planning.job import FP32, NO_OFFLOAD, NO_RECOMPUTE
from megatron_mone.planning.layout_axes import Pipeline, Shards
from megatron_mone.planning.layout_model import Numbers, shape_of
from megatron_mone.planning.small_groups import SmallGroups
from megatron_mone.planning.stage_split import Split, balanced_split, even_split
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import DEVICE_WAIT, Collective

SURE_OF_LAUNCHES = 0.95
"""Of the host's time as it is put together, what it takes at least: tensor parallelism adds other
launches beside recomputed modules."""
_BIG = 1 << 16  # bytes of an exchange of tokens, not of their counts


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


class ScaledTime:
    """Of every layout.

    Args:
        groups: the units.
        cluster, efficiency: of the planner.
    """

    def __init__(self, groups: SmallGroups, cluster: Cluster, efficiency: Efficiency) -> None:
        self._groups, self.model = groups, groups.model
        self._cluster, self._efficiency = cluster, efficiency
        self._ops = {
            (name, forward): [
                _Ops.of(unit.parts[part], forward, self.model.facts, efficiency)
                for part in self.model.parts
            ]
            for name, unit in groups.recomputed.items()
            for forward in (True, False)
        }
        self._more_host = {forward: self._host_over_tensor(forward) for forward in (True, False)}
        self._known: dict[tuple[Shards, bool], Numbers] = {}
        self._splits: dict[tuple[object, ...], Split] = {}

    def passes(self, shards: Shards, stages: int, split: Split) -> tuple[Numbers, Numbers]:
        """[P, V] seconds of one micro-batch's forward and backward.

        Args:
            shards: of a layer.
            stages: P.
            split: of the layers.
        """
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
                layers, shape, lambda split: self.passes(shards, pp, split)
            )
        if self._splits[key] != even:
            found.append(Pipeline(pp, vpp, self._splits[key], False))
        return found

    def _seconds(self, shards: Shards, forward: bool) -> Numbers:
        """[3, K] of the device, of the host and of communication; neither the state counts nor
        copies of activations."""
        plain = replace(shards, state=FP32, offload=NO_OFFLOAD)
        if (plain, forward) not in self._known:
            recompute = (
                shards.recompute if shards.recompute in self._groups.recomputed else NO_RECOMPUTE
            )
            ops_K = self._ops[recompute, forward]
            device_K = [
                ops.waits
                + sum(
                    count * self._device_seconds(self._scaled(one, shards))
                    for one, count in ops.counts.items()
                )
                for ops in ops_K
            ]
            fewer = self._groups.base.ep / shards.ep  # experts of a rank
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
        if self._groups.over_tensor is None:
            return np.zeros(len(self.model.parts))
        plain = [ops.host for ops in self._ops[NO_RECOMPUTE, forward]]
        found = [
            _Ops.of(
                self._groups.over_tensor.parts[part], forward, self.model.facts, self._efficiency
            ).host
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
            more *= shards.ep / self._groups.base.ep * shards.etp / ranks
            moved = min(moved, self._groups.base.ep / (shards.ep * shards.etp))
        if one.kind in ("gemm", "grouped_gemm") and more > 1:
            one = replace(one, rows=one.rows * more, depth=math.ceil(one.depth * more))
        return replace(one, flops=one.flops * tokens, bytes=one.bytes * moved)

    def _communication(self, shards: Shards, recompute: str, forward: bool) -> Numbers:
        """[K] seconds of tensor- and expert-parallel traffic that nothing hides."""
        found = np.zeros(len(self.model.parts))
        for column, part in enumerate(self.model.parts):
            moved: list[tuple[Collective, int]] = []
            if shards.tp > 1 and self._groups.over_tensor is not None:
                for one, count in self._groups.over_tensor.parts[part].collectives.items():
                    if one.group == "tp" and one.of_micro_batch:
                        size = one.bytes * shards.mbs / shards.cp
                        size *= 2 / shards.tp if one.kind == "all_gather" else 1
                        moved.append(
                            (replace(one, bytes=round(size), ranks=shards.tp, stride=1), count)
                        )
            if not self.model.facts.overlap_expert_parallel:
                for one, count in (
                    self._groups.recomputed[recompute].parts[part].collectives.items()
                ):
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
