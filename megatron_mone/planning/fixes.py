"""The cheapest single change by which a layout fits that does not.

May touch: the tracer's processes and cache, by way of the Planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_mone.planning.job import SHORT, recompute_fields
from megatron_mone.planning.planner import Planned, Planner
from megatron_mone.planning.tracing.job_facts import JobFacts

_SMALL_STATE = {
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": "bf16",
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
}


def changes(facts: JobFacts) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what it is in words, Megatron arguments) of single changes, cheap ones first."""
    modules = "layernorm+moe_act" if facts.num_experts else "layernorm+mlp"
    if facts.recompute_granularity == "":
        yield f"recompute {modules}", recompute_fields(modules)
    if facts.num_experts and "moe" not in facts.recompute_modules:
        yield "recompute layernorm and moe", recompute_fields("layernorm+moe")
    if facts.distributed_optimizer:
        yield "optimizer moments and main gradients in bf16", dict(_SMALL_STATE)
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
