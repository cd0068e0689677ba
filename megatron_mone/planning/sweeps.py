"""What a plan compares beside its models: other numbers of devices, of neurons, of experts.

May touch: the tracer's processes and cache, by way of the Planner.
Shapes: K_E experts of a token, K_N kept neurons of F in each, r = K_N / F.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_mone.common.phases import COMBINE, DISPATCH, GATE_GEMM, SELECTION, UP_DOWN_GEMM
from megatron_mone.planning.composed import scaled_facts, scaled_traces
from megatron_mone.planning.cost.prediction import Prediction, predict
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.plan_document import ExpertPoint, RatioPoint, ScaledModel, ScalingPoint
from megatron_mone.planning.plan_parts import GIB, figures
from megatron_mone.planning.planner import Planned, Planner, Progress

SCALES = tuple(128 << k for k in range(8))  # 128 to 16,384
RATIOS = (1.0, 0.5, 0.25, 0.125, 0.0625)
_EXPERT_PHASES = (GATE_GEMM, SELECTION, UP_DOWN_GEMM, DISPATCH, COMBINE)
_ALIGNED = 8  # K_N is a multiple, so that rows of kept neurons stay aligned


def scaling_curve(models: Mapping[str, Planned], planner: Planner) -> list[ScalingPoint]:
    """Every model in its layout on 128 to 16,384 devices, as many samples on each.

    Args:
        models: name -> plan.
        planner: of the cluster.
    """
    curve = []
    for gpus in SCALES:
        found = {}
        for name, planned in models.items():
            facts = scaled_facts(planned.traced.facts, gpus)
            if facts is None:
                continue
            traces = scaled_traces(planned.traced.traces, planned.traced.facts, gpus)
            found[name] = _point(predict(traces, facts, planner.cluster, planner.efficiency))
        if found:
            curve.append(ScalingPoint(gpus=gpus, models=found))
    return curve


def ratio_sweep(
    job: JobSpec, gpus: int, planner: Planner, progress: Progress | None = None
) -> list[RatioPoint]:
    """A MoNE model at each of RATIOS.

    Args:
        job: a MoNE model's.
        gpus: W.
        planner: of the cluster.
        progress: told (done, of how many).
    """
    width = int(job.model["moe_ffn_hidden_size"])
    step = _step(job)
    kept = sorted({_rounded(ratio * width, width, step) for ratio in RATIOS}, reverse=True)
    points = []
    for done, neurons in enumerate(kept):
        if progress is not None:
            progress(done, len(kept))
        planned = planner.plan(_with_neurons(job, neurons), gpus)
        swept = _experts(planned.prediction)
        points.append(RatioPoint(r=neurons / width, neurons=neurons, **swept))
    return points


def expert_sweep(
    job: JobSpec,
    gpus: int,
    planner: Planner,
    skipped: list[str],
    progress: Progress | None = None,
) -> list[ExpertPoint]:
    """K_E x K_N at equal operations of the active experts: fewer experts, more neurons of each.

    A token's experts take 2 H K_E (F + 8 K_N) operations forward and backward: the gate is whole,
    up, down and all gradients are of the kept neurons. K_N is what keeps that at what the job's own
    K_E and K_N take.

    Args:
        job, gpus, planner, progress: as in `ratio_sweep`.
        skipped: gets a line for each pair that Megatron refuses.
    """
    width, chosen = int(job.model["moe_ffn_hidden_size"]), int(job.model["moe_router_topk"])
    budget = chosen * (width + 8 * _neurons(job))
    pairs = list(_equal_pairs(budget, width, int(job.model["num_experts"]), _step(job)))
    points = []
    for done, (topk, neurons) in enumerate(pairs):
        if progress is not None:
            progress(done, len(pairs))
        try:
            planned = planner.plan(_with_neurons(job, neurons, moe_router_topk=topk), gpus)
        except ValueError as error:
            skipped.append(f"K_E = {topk}, K_N = {neurons} is left out of the sweep: {error}")
            continue
        prediction = planned.prediction
        points.append(
            ExpertPoint(
                topk=topk, neurons=neurons, r=neurons / width, **_experts(prediction),
                exposed_comm_ms=1e3 * prediction.exposed,
            )
        )  # fmt: skip
    return points


def _equal_pairs(budget: int, width: int, experts: int, step: int) -> Iterator[tuple[int, int]]:
    for topk in range(1, experts + 1):
        neurons = (budget / topk - width) / 8
        if neurons > width:
            continue
        if neurons < step:
            return
        yield topk, _rounded(neurons, width, step)


def _step(job: JobSpec) -> int:
    """What K_N is a multiple of: aligned rows, of whole blocks of each group."""
    groups, block = (int(job.model.get(f"mone_neuron_{of}", 1)) for of in ("groups", "block"))
    return math.lcm(_ALIGNED, groups * block)


def _rounded(neurons: float, width: int, step: int) -> int:
    return max(1, min(width, max(step, step * round(neurons / step))))


def _neurons(job: JobSpec) -> int:
    given = job.model.get("mone_neurons_per_token")
    if given is not None:
        return int(given)
    return round(float(job.model["mone_neuron_ratio"]) * int(job.model["moe_ffn_hidden_size"]))


def _with_neurons(job: JobSpec, neurons: int, **changes: Any) -> JobSpec:
    model = {k: v for k, v in job.model.items() if k != "mone_neuron_ratio"}
    model = {**model, "mone_neurons_per_token": neurons, **changes}
    return JobSpec(job.name, model, job.parallel, job.cluster, job.train)


def _point(prediction: Prediction) -> ScaledModel:
    rates = figures(prediction)
    return ScaledModel(
        step_ms=rates["step_ms"],
        tokens_per_s_per_gpu=rates["tokens_per_s_per_gpu"],
        tflops_per_gpu=rates["tflops_per_gpu"],
        fits=prediction.fits,
        peak_gib=prediction.peak / GIB,
    )


def _experts(prediction: Prediction) -> dict[str, float]:
    """What a point of either sweep says of a step."""
    spent = sum(prediction.phases.get(phase, 0.0) for phase in _EXPERT_PHASES)
    return {
        "step_ms": 1e3 * prediction.seconds,
        "tokens_per_s_per_gpu": prediction.tokens_per_second,
        "peak_gib": prediction.peak / GIB,
        "expert_ms": 1e3 * spent,
        "active_flops": prediction.facts.active_flops_per_step,
    }
