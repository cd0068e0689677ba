"""The first bound: of any layout, before its own sharding is traced, scaled from units of small
groups: its bytes (scaled_memory.py) and its seconds (scaled_time.py).

May touch: the tracer's processes and cache, by way of the units.
Shapes: P stages, V chunks, S = P V virtual stages; K parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.host_cost import host_of
from megatron_mone.planning.cost.rank_memory import COMMUNICATOR, CONTEXT, FRAGMENTATION
from megatron_mone.planning.job import FP32, ON_HOST
from megatron_mone.planning.layout_axes import Pipeline, Shards
from megatron_mone.planning.layout_model import shape_of
from megatron_mone.planning.scaled_memory import ScaledMemory
from megatron_mone.planning.scaled_time import ScaledTime
from megatron_mone.planning.small_groups import SmallGroups
from megatron_mone.planning.stage_split import held_micro_batches, least_seconds

SURE_OF_ACTIVATIONS = 0.97
"""Of activations as they are scaled, what a layout keeps at least; what holds them whole on each
rank, or twice, as expert tensor parallelism does, makes it more."""


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


class Scaled:
    """Of every layout.

    Args:
        groups: the units.
        cluster, efficiency: of the planner.

    Attributes:
        groups: the units.
        model: of the job.
        memory, time: what they are scaled to.
    """

    def __init__(self, groups: SmallGroups, cluster: Cluster, efficiency: Efficiency) -> None:
        self.groups, self.model = groups, groups.model
        self.memory = ScaledMemory(groups)
        self.time = ScaledTime(groups, cluster, efficiency)
        self._cluster = cluster

    def bound(self, shards: Shards, pipeline: Pipeline) -> Bound:
        """Of a layout."""
        shape = shape_of(shards, pipeline, self.model)
        seconds = least_seconds(shape, *self.time.passes(shards, pipeline.pp, pipeline.split))
        seconds += self.update_seconds(shards, pipeline)
        n_SK = self.model.contents(pipeline.split)
        held_P = self.memory.stage_bytes(shards, pipeline.pp, n_SK, weights=1.0) + CONTEXT
        kept_S, working_S = self.memory.activations(shards, n_SK)
        kept_PV = kept_S.reshape(-1, pipeline.pp).T
        working_P = working_S.reshape(-1, pipeline.pp)[-1]
        moving_P = (held_micro_batches(shape) * kept_PV).sum(1) + working_P
        peak_P = held_P + (1 + FRAGMENTATION) * SURE_OF_ACTIVATIONS * moving_P
        # The ranks that share a micro-batch, at least.
        peak_P += COMMUNICATOR * ((shards.tp > 1) + (shards.cp > 1) + (shards.ep > 1))
        return Bound(seconds, float(held_P.max()), float(peak_P.max()))

    def update_seconds(self, shards: Shards, pipeline: Pipeline) -> float:
        """Of the optimizer, where the host makes it: it reads and writes all of its state.

        Of the device's optimizer nothing is counted.
        """
        if shards.state != ON_HOST:
            return 0.0
        n_SK = self.model.contents(pipeline.split)
        held = replace(shards, state=FP32)
        state_P = self.memory.stage_bytes(held, pipeline.pp, n_SK, weights=0.0)
        host = host_of(self._cluster)
        return 2 * float(state_P.max()) / (host.memory_bandwidth * host.efficiency)
