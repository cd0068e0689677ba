"""What runs will cost, by the planner, before any is submitted.

May touch: the planner's processes and cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.spec.checked_flags import stated_job
from megatron_mone.common.progress import Say

if TYPE_CHECKING:
    from megatron_mone.planning.cost.hardware import Cluster

_GIB = 2**30
_FREE = dict.fromkeys((
    "seed", "lr", "min_lr", "lr_warmup_iters", "lr_decay_iters", "train_iters", "weight_decay",
    "eval_interval", "eval_iters", "log_interval", "save_interval", "tensorboard_log_interval",
    "mone_threshold",
))  # fmt: skip
_WEIGHTS = ("mone_ng_loss_coeff", "moe_aux_loss_coeff")
"""Cost something where they are not 0, whatever they are."""


@dataclass(frozen=True)
class PlannedCost:
    """A step of one run.

    Attributes:
        step_seconds: predicted.
        tokens_per_step: of all ranks.
        peak_gib: of the fullest rank.
    """

    step_seconds: float
    tokens_per_step: int
    peak_gib: float


def cost_key(values: Mapping[str, Any]) -> str:
    """What of a run's arguments decides the cost of its step, as JSON; equal for equal costs."""
    own = {name: value for name, value in values.items() if name not in _FREE}
    own |= {name: float(bool(own[name])) for name in _WEIGHTS if name in own}
    return json.dumps(own, sort_keys=True)


def planned_costs(
    jobs: Sequence[tuple[str, Mapping[str, Any]]], gpus: int, cluster: str, say: Say
) -> Iterator[PlannedCost]:
    """The cost of a step of each of some runs, put together from traces of a few of their layers.

    Args:
        jobs: name for errors, Megatron's arguments, `vocab_size` among them.
        gpus: of each run.
        cluster: of configs/cluster/hardware, or a YAML file.
        say: told runs planned, of how many, and of what.

    Yields:
        A run's, in their order.

    Raises:
        ValueError: one line; Megatron or the planner refuses a run, or it does not fit.
    """
    from megatron_mone.planning.composed import Composer
    from megatron_mone.planning.cost.efficiency import efficiency_of
    from megatron_mone.planning.planner import Planner
    from megatron_mone.planning.tracing.trace_cache import TraceCache
    from megatron_mone.planning.tracing.trace_server import Tracer

    hardware = _hardware(cluster)
    limit = hardware.device.memory_bytes / _GIB
    known: dict[str, PlannedCost] = {}
    with Tracer(TraceCache()) as tracer:
        composer = Composer(Planner(tracer, hardware, efficiency_of(hardware.name)))
        for done, (name, values) in enumerate(jobs):
            say(done, len(jobs), f"planning {name}")
            key = cost_key(values)
            if key not in known:
                try:
                    prediction = composer.plan(stated_job(name, values, ()), gpus).prediction
                except (ValueError, RuntimeError) as error:
                    raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
                facts = prediction.facts
                known[key] = PlannedCost(
                    prediction.seconds, facts.global_batch_size * facts.seq_length,
                    prediction.peak / _GIB,
                )  # fmt: skip
            if known[key].peak_gib > limit:
                raise ValueError(
                    f"{name}: planner ({cluster}): {known[key].peak_gib:.1f} of {limit:.1f} GiB on "
                    f"the fullest of {gpus} GPUs: does not fit; name a larger GPU in "
                    "planner_cluster of the launch file"
                )
            yield known[key]
        say(len(jobs), len(jobs), "planned")


def memory_gib(cluster: str) -> float:
    """Memory of a GPU of a cluster.

    Raises:
        ValueError: there is no such cluster; one line.
    """
    return _hardware(cluster).device.memory_bytes / _GIB


def _hardware(cluster: str) -> Cluster:
    from megatron_mone.planning.cost.hardware import load_cluster

    try:
        return load_cluster(cluster)
    except ValueError as error:
        raise ValueError(f"planner_cluster = {cluster!r}: {error}") from error
