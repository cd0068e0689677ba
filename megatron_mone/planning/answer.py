"""A question and a planner -> the document of a plan, or of a search over layouts.

May touch: the planner's tracer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mone.common.progress import Say
from megatron_mone.planning import sweeps
from megatron_mone.planning.comparison import (
    compared,
    comparison_table,
    differences,
    memory_parts,
    step_parts,
)
from megatron_mone.planning.cost.bands import tied
from megatron_mone.planning.cost.prediction import Prediction
from megatron_mone.planning.fixes import cheapest_fix, faster_stages
from megatron_mone.planning.job import JobSpec, short_layout
from megatron_mone.planning.plan_document import (
    Best,
    CandidateLayout,
    Comparison,
    ExpertPoint,
    Fix,
    Plan,
    Range,
    RatioPoint,
    Refused,
    Routing,
    Search,
)
from megatron_mone.planning.plan_parts import GIB, cluster_document, layout_document, model_document
from megatron_mone.planning.planner import Planned, Planner, Progress
from megatron_mone.planning.question import Question, is_mone
from megatron_mone.planning.search import Candidate, explain, pareto, search
from megatron_mone.planning.terminal_tables import (
    nothing_fits,
    nothing_planned,
    search_table,
    table,
)
from megatron_mone.profiling.baselines import MAIN


@dataclass(frozen=True)
class Answer:
    """What there is to write and to say.

    Attributes:
        document: to be written.
        runs: name of a run file -> its job.
        text: for a terminal.
        fits: whether the layout fits the devices.
        refusal: one line where no layout of a search fits, or nothing.
    """

    document: Plan | Search | Comparison
    runs: Mapping[str, JobSpec]
    text: str
    fits: bool = True
    refusal: str = ""


def answer_plan(planner: Planner, question: Question, sweep: bool, say: Say) -> Answer:
    """The plan of a job and of those it is compared with."""
    job, gpus = question.job, question.gpus
    main = MAIN if is_mone(job) else "moe"
    jobs = {main: job, **{spec.name: job.against(spec) for spec in question.baselines}}
    planned = {name: planner.plan(one, gpus, _about(say, name)) for name, one in jobs.items()}
    models = [
        model_document(
            name,
            one.prediction,
            one.stage_kinds,
            _fix(planner, one, gpus, say),
            _faster(planner, one, gpus, say),
        )
        for name, one in planned.items()
    ]
    warnings = _warnings(planner, planned)
    scaling = sweeps.scaling_curve(planned, planner)
    by_ratio: list[RatioPoint] = []
    by_experts: list[ExpertPoint] = []
    if sweep:
        by_ratio = sweeps.ratio_sweep(job, gpus, planner, _about(say, "r"))
        by_experts = sweeps.expert_sweep(job, gpus, planner, warnings, _about(say, "K_E x K_N"))
    plan = Plan(
        **_head(question, planner, planned[main]),
        warnings=warnings,
        models=models,
        scaling=scaling,
        ratio_sweep=by_ratio,
        expert_sweep=by_experts,
    )
    runs = {_file_name(name): plan_of.job for name, plan_of in planned.items()}
    return Answer(plan, runs, table(plan), planned[main].prediction.fits)


def answer_comparison(planner: Planner, question: Question, second: JobSpec, say: Say) -> Answer:
    """Two layouts, part by part.

    Args:
        planner: of the cluster.
        question: whose job is the first.
        second: the other.
        say: told what is traced.
    """
    jobs = question.job, second
    plans = [planner.plan(job, question.gpus, _about(say, job.name)) for job in jobs]
    one, other = (plan.prediction for plan in plans)
    document = Comparison(
        **_head(question, planner, plans[0]),
        warnings=_warnings(
            planner, {job.name: plan for job, plan in zip(jobs, plans, strict=True)}
        ),
        first=compared(jobs[0].name, plans[0]),
        second=compared(jobs[1].name, plans[1]),
        step_ms=differences(step_parts(one), step_parts(other), 1e3),
        compute_ms=differences(one.phases, other.phases, 1e3),
        memory_gib=differences(memory_parts(one), memory_parts(other), 1 / GIB),
    )
    return Answer(document, {}, comparison_table(document), one.fits and other.fits)


def answer_search(planner: Planner, question: Question, limit: int, best: int, say: Say) -> Answer:
    """The search over layouts.

    Args:
        planner: of the cluster.
        question: whose job's layout is changed.
        limit: layouts to plan.
        best: of the fastest that fit, how many are sought and shown.
        say: told what is planned.

    Raises:
        ValueError: one line; no layout could be planned.
    """
    found = search(planner, question.job, question.gpus, limit, best, say, question.allowed)
    asked = question.job.name, question.gpus, question.cluster.device
    if not found.candidates:
        raise ValueError(nothing_planned(found, *asked))
    fastest = found.fitting[:best]
    front = pareto(found.candidates)
    document = Search(
        **_head(question, planner, found.candidates[0].planned),
        warnings=_assumed([one.planned.prediction for one in found.candidates]),
        candidates=[_candidate(one, one.layout in front, fastest) for one in found.candidates],
        refused=[Refused(layout=layout, reason=reason) for layout, reason in found.refused],
        hopeless=found.hopeless,
        not_tried=dict(found.not_tried),
        axes=found.axes,
        least_ms=None if found.least_seconds is None else 1e3 * found.least_seconds,
        best=[Best(layout=one.layout, why=explain(one, fastest[0])) for one in fastest],
    )
    text = search_table(document)
    if not fastest:
        return Answer(document, {}, text, refusal=nothing_fits(found, *asked))
    return Answer(document, {"best": fastest[0].planned.job}, text)


def _about(say: Say, what: str) -> Progress:
    return lambda done, total: say(done, total, what)


def _candidate(one: Candidate, on_front: bool, best: Sequence[Candidate]) -> CandidateLayout:
    prediction = one.planned.prediction
    band = prediction.band
    return CandidateLayout(
        name=one.layout,
        layout=layout_document(prediction.facts),
        fits=prediction.fits,
        step_ms=1e3 * prediction.seconds,
        tokens_per_s_per_gpu=prediction.tokens_per_second,
        peak_gib=prediction.peak / GIB,
        parts_ms={name: 1e3 * value for name, value in prediction.parts.items()},
        pareto=on_front,
        step_ms_band=Range(low=1e3 * band.low, high=1e3 * band.high),
        tied=bool(best) and prediction.fits and tied(band, best[0].planned.prediction.band),
    )


def _head(question: Question, planner: Planner, planned: Planned) -> dict[str, Any]:
    """What a plan and a search begin with."""
    facts = planned.prediction.facts
    return {
        "model": question.job.name,
        "gpus": question.gpus,
        "tokens_per_step": facts.global_batch_size * facts.seq_length,
        "cluster": cluster_document(question.cluster),
        "efficiency": planner.efficiency.source,
        "routing": Routing(kind=question.skew.kind, hottest=planned.hottest),
    }


def _warnings(planner: Planner, planned: dict[str, Planned]) -> list[str]:
    domain = planner.cluster.domain.devices
    return _assumed([one.prediction for one in planned.values()]) + [
        f"{name}: tensor parallelism leaves the NVLink domain of {domain} devices."
        for name, one in planned.items()
        if one.prediction.facts.tp > domain
    ]


def _assumed(predictions: Sequence[Prediction]) -> list[str]:
    found = ["Nothing here was run on a GPU: times are of a model of the machine."]
    if any(memory.host for one in predictions for memory in one.memory_P):
        found.append(
            "Times of the host follow its published bandwidths; they are fitted to nothing."
        )
    for tokens in {one.facts.document_tokens for one in predictions} - {0}:
        found.append(
            f"Attention is of packed documents of {tokens:,} tokens each; --document-tokens takes "
            "another length."
        )
    return found


def _fix(planner: Planner, planned: Planned, gpus: int, say: Say) -> Fix | None:
    if planned.prediction.fits:
        return None
    fix = cheapest_fix(planner, planned, gpus, lambda words: say(0, 1, f"trying {words}"))
    if fix is None:
        return None
    return _as_fix(*fix)


_UNEVEN = 0.02  # of a step; an imbalance that layers are moved for


def _faster(planner: Planner, planned: Planned, gpus: int, say: Say) -> Fix | None:
    prediction = planned.prediction
    if prediction.imbalance_P.max() < _UNEVEN * prediction.seconds:
        return None
    say(0, 1, "moving layers between stages")
    found = faster_stages(planner, planned, gpus)
    return None if found is None else _as_fix(*found)


def _as_fix(words: str, planned: Planned) -> Fix:
    prediction = planned.prediction
    return Fix(
        change=words,
        layout=short_layout(planned.job.values()),
        step_ms=1e3 * prediction.seconds,
        peak_gib=prediction.peak / GIB,
    )


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
