"""The second bound: of all layouts of one sharding, from its unit (composed.py), all but exact.

What is left out is what waits for what within the schedule, and what a step has once. Neither
seconds nor bytes are more than what the planner finds. Touches nothing.
Shapes: P stages, V chunks, S = P V virtual stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mone.planning.composed import Unit
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.prediction import beside_seconds
from megatron_mone.planning.cost.rank_cost import ChunkCost, PassCost, chunk_cost
from megatron_mone.planning.cost.rank_memory import (
    COMMUNICATOR,
    CONTEXT,
    DEEPEP_BUFFERS,
    FRAGMENTATION,
    working_bytes,
)
from megatron_mone.planning.layout_axes import Pipeline, Shards, sized
from megatron_mone.planning.layout_model import Model, Numbers
from megatron_mone.planning.scaled_bound import Bound
from megatron_mone.planning.scaled_memory import WITHOUT_PADDING
from megatron_mone.planning.stage_split import (
    Shape,
    Split,
    held_micro_batches,
    least_seconds,
    split_stages,
)
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import StageMemory, Trace


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
        shares = gradients, WITHOUT_PADDING * optimizer
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
