"""One job in the hands of either engine, over sizes of expert parallelism: step and memory.

May touch: the tracer's processes and cache, by way of the Planner.
"""

from collections.abc import Mapping
from typing import Any

from megatron_mone.common.progress import Say
from megatron_mone.deepspeed.settings import DEEPSPEED, OF_MEGATRON
from megatron_mone.planning.job import SHORT, JobSpec
from megatron_mone.planning.plan_parts import GIB
from megatron_mone.planning.planner import Planner

CLUSTER = "h100-ndr"
EXPERT_PARALLEL = (1, 2, 4, 8, 16, 32)
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "Megatron, distributed optimizer": {},
    "Megatron, DDP": dict.fromkeys(OF_MEGATRON) | {"overlap_grad_reduce": True},
    **{
        f"DeepSpeed, ZeRO {stage}": dict.fromkeys((*OF_MEGATRON, "pipeline_model_parallel_size"))
        | {"engine": DEEPSPEED, "zero_stage": stage, "gradient_accumulation_fusion": False}
        for stage in range(4)
    },
}
"""What holds gradients and optimizer state -> changes to a run file of Megatron's own engine."""
HEAD = (
    "| engine | EP | step ms | data parallel ms | peak GiB | weights | gradients | optimizer "
    "| activations and transient |\n"
    "| --- | --: | --: | --: | --: | --: | --: | --: | --: |"
)


def zero_table(planner: Planner, job: JobSpec, gpus: int, say: Say) -> str:
    """Rows of Markdown; those that are refused say why.

    Args:
        planner: of the cluster.
        job: of Megatron's own engine.
        gpus: W.
        say: told of the progress.
    """
    rows = [HEAD]
    reasons: dict[str, list[str]] = {}
    cells = [(name, size) for name in ENGINES for size in EXPERT_PARALLEL]
    for done, (name, size) in enumerate(cells):
        say(done, len(cells), f"{name}, EP {size}")
        layout = {**ENGINES[name], SHORT["ep"]: size}
        try:
            prediction = planner.plan(job.with_layout(layout), gpus).prediction
        except ValueError as error:
            reasons.setdefault(str(error), []).append(f"{name}, EP {size}")
            continue
        memory = prediction.memory_P[prediction.fullest]
        data = sum(prediction.parts.get(part, 0.0) for part in _OVER_REPLICAS)
        parts = (memory.peak, memory.weights, memory.gradients, memory.optimizer,
                 memory.activations + memory.transient)  # fmt: skip
        peak, *rest = (f"{part / GIB:.1f}" for part in parts)
        does_not = "" if prediction.fits else " (does not fit)"
        figures = (f"{1e3 * prediction.seconds:,.0f}", f"{1e3 * data:,.0f}", peak + does_not, *rest)
        rows.append(f"| {name} | {size} | {' | '.join(figures)} |")
    rows += ["", *(f"- {'; '.join(where)}: {why}" for why, where in reasons.items())]
    return "\n".join(rows)


_OVER_REPLICAS = ("data parallel", "expert data parallel")
