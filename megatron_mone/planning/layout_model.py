"""What bounds ask of a model: its layers, the parts of which its stages are put together, and the
schedule and traced unit of a layout.

May touch: the tracer's processes and cache, by way of the Composer.
Shapes: S virtual stages; K parts (kinds of layer, embedding, head, rest).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mone.planning.composed import Composer, Unit
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.layout_axes import Pipeline, Shards, sized
from megatron_mone.planning.stage_split import Shape, Split
from megatron_mone.planning.tracing.job_facts import JobFacts

Numbers = NDArray[np.float64]


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


def unit_of(composer: Composer, model: Model, shards: Shards) -> Unit:
    """The unit of a sharding.

    Raises:
        ValueError: one line; Megatron refuses it.
        RuntimeError: one line; a trace failed.
    """
    facts = sized(model.facts, shards, Pipeline(1, 1, (len(model.kinds),), True), model.gpus)
    return composer.unit(model.job.with_layout(shards.fields), facts, model.kinds)
