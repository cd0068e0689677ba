"""Of one layout that does not fit, the cheapest single change by which it does; of one whose stages
are uneven, the layers to move.

May touch: the tracer's processes and cache, by way of the Planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_mone.planning.composed import Composer, layer_kinds
from megatron_mone.planning.composed_bound import Composed
from megatron_mone.planning.job import BF16, SHORT, recompute_fields, state_fields
from megatron_mone.planning.layout_axes import Pipeline, Shards
from megatron_mone.planning.layout_model import Model
from megatron_mone.planning.planner import Planned, Planner
from megatron_mone.planning.stage_split import Shape, Split, balanced_split
from megatron_mone.planning.tracing.job_facts import JobFacts


def changes(facts: JobFacts) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what it is in words, Megatron arguments) of single changes, cheap ones first."""
    modules = "layernorm+moe_act" if facts.num_experts else "layernorm+mlp"
    if facts.recompute_granularity == "":
        yield f"recompute {modules}", recompute_fields(modules)
    if facts.num_experts and "moe" not in facts.recompute_modules:
        yield "recompute layernorm and moe", recompute_fields("layernorm+moe")
    if facts.distributed_optimizer:
        yield "optimizer moments and gradients in bf16", state_fields(BF16)
    if facts.micro_batch_size > 1:
        yield "micro batch 1", {SHORT["mbs"]: 1}
    if facts.ep and facts.num_experts % (2 * facts.ep) == 0 and facts.edp % 2 == 0:
        yield f"ep {2 * facts.ep}", {SHORT["ep"]: 2 * facts.ep}
    if facts.dp % 2 == 0 and facts.edp % 2 == 0 and 2 * facts.pp * facts.vp <= facts.num_layers:
        layers = {"pipeline_model_parallel_layout": None}
        yield f"pp {2 * facts.pp}", {SHORT["pp"]: 2 * facts.pp, **layers}
    if facts.dp % 2 == 0:
        wider = {SHORT["tp"]: 2 * facts.tp, SHORT["etp"]: facts.etp, "sequence_parallel": True}
        yield f"tp {2 * facts.tp}", wider
    if facts.recompute_granularity != "full":
        yield "recompute full", recompute_fields("full")


def cheapest_fix(
    planner: Planner,
    planned: Planned,
    gpus: int,
    progress: Callable[[str], None] | None = None,
) -> tuple[str, Planned] | None:
    """The fastest of the changes that make a layout fit; None where no single one does.

    Args:
        planner: of the cluster.
        planned: that does not fit.
        gpus: W.
        progress: told what is tried.
    """
    best: tuple[str, Planned] | None = None
    for words, fields in changes(planned.traced.facts):
        if progress is not None:
            progress(words)
        try:
            tried = planner.plan(planned.job.with_layout(fields), gpus)
        except ValueError:
            continue  # Megatron refuses this change in this layout: the next one
        if not tried.prediction.fits:
            continue
        if best is None or tried.prediction.seconds < best[1].prediction.seconds:
            best = words, tried
    return best


_WORTH = 0.005
"""Of a step: what moving layers must save to be said."""


def faster_stages(planner: Planner, planned: Planned, gpus: int) -> tuple[str, Planned] | None:
    """Layers moved between stages, one by one as long as each makes the step shorter.

    Args:
        planner: of the cluster.
        planned: any layout.
        gpus: W.

    Returns:
        what moves, in words, and the layout's plan from composed traces; None where no move is
        worth it, fits a device that the layout fits, or can be planned.
    """
    job, facts = planned.job, planned.traced.facts
    kinds = layer_kinds(job, planned.stage_kinds)
    if facts.pp == 1 or kinds is None or facts.zero_stage is not None or facts.fsdp:
        return None
    composer, mtp = Composer(planner), int(job.values().get("mtp_num_layers") or 0)
    shards = Shards(facts.tp, facts.cp, facts.ep, facts.etp, facts.micro_batch_size)
    shape = Shape(facts.pp, facts.vp, facts.micro_batches, facts.microbatch_group_size_per_vp_stage)
    before = _split(planned)
    try:
        unit = composer.unit(job, facts, kinds)
        model = Model(job, facts, tuple(kinds), mtp, gpus)
        composed = Composed(unit, shards, model, planner.cluster, planner.efficiency)
        after = balanced_split(
            len(kinds), shape, lambda split: composed.passes(split, facts), start=before
        )
        fields = Pipeline(facts.pp, facts.vp, after, False).fields(mtp)
        tried, now = (
            composer.plan(one, gpus) for one in (job.with_layout(fields), job)
        )  # fmt: skip
    except ValueError:
        return None  # Megatron refuses those stages
    saved = now.prediction.seconds - tried.prediction.seconds
    fits = tried.prediction.fits or not now.prediction.fits
    if not fits or saved < _WORTH * now.prediction.seconds:
        return None
    return _moved(before, after, facts.pp), tried


def _split(planned: Planned) -> Split:
    """Decoder layers of every virtual stage, in the order of a micro-batch."""
    facts, keys = planned.traced.facts, planned.stage_kinds
    places = [(stage, chunk) for chunk in range(facts.vp) for stage in range(facts.pp)]
    return tuple(len(layer_kinds(planned.job, {(0, 0): keys[place]}) or ()) for place in places)


def _moved(before: Split, after: Split, stages: int) -> str:
    """ "layers of stage 0: 12 to 13, of stage 3: 12 to 9"."""
    changed = [
        f"{stage}: {old} to {new}"
        for stage, (old, new) in enumerate(
            zip(
                (sum(before[stage::stages]) for stage in range(stages)),
                (sum(after[stage::stages]) for stage in range(stages)),
                strict=True,
            )
        )
        if old != new
    ]
    return f"layers of stage {', of stage '.join(changed)}" if changed else "layers between chunks"
