"""What a layout holds and takes at least, so that a search need not plan what cannot win.

Two bounds, both of the same composed step (composed.py):

1. Scaled (scaled_bound.py): from units traced with small groups, before a layout's own is.
2. Composed (composed_bound.py): from the unit of a layout's own sharding.

Memory that is called `held` (weights, gradients, optimizer, the CUDA context) and `peak` of the
second bound is never more than what the planner finds; `peak` of the first is an estimate.
May touch: the tracer's processes and cache, by way of the Composer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from megatron_mone.planning.composed import Composer
from megatron_mone.planning.composed_bound import Composed
from megatron_mone.planning.job import FP32
from megatron_mone.planning.layout_axes import Axes, Pipeline, Shards
from megatron_mone.planning.layout_model import unit_of
from megatron_mone.planning.planner import Planner
from megatron_mone.planning.scaled_bound import Bound, Scaled


class Bounds:
    """Both bounds of every layout of a job.

    Args:
        scaled: the first.
        composer: that traces units for the second.
        planner: of the cluster.
        axes: all there are.
    """

    def __init__(self, scaled: Scaled, composer: Composer, planner: Planner, axes: Axes) -> None:
        self._scaled, self._composer, self._model = scaled, composer, scaled.model
        self._cluster, self._efficiency = planner.cluster, planner.efficiency
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
        return replace(axes, states=tuple(filter(self._scaled.groups.takes, axes.states)))

    def pipelines(self, shards: Shards, pp: int, vpp: int) -> list[Pipeline]:
        """Splits of the layers over P stages of V chunks."""
        return self._scaled.time.pipelines(shards, pp, vpp)

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
                unit, plain, self._model, self._cluster, self._efficiency
            )
        bound = self._composed[plain].bound(
            pipeline, *self._scaled.memory.shares_of_state(shards.state)
        )
        update = self._scaled.update_seconds(shards, pipeline)
        return replace(bound, seconds=bound.seconds + update)
