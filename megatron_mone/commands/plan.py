"""What tools/plan_scale.py does: reads what was asked, plans, prints a table, writes the files.

May touch: the files asked for, beside which reports and run files go; the terminal; the tracer.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mone.common.files import write_json
from megatron_mone.common.progress import Say, progress_bar
from megatron_mone.planning import sweeps
from megatron_mone.planning.cost.efficiency import Efficiency, efficiency_of
from megatron_mone.planning.cost.hardware import Cluster, load_cluster
from megatron_mone.planning.cost.routing_skew import Skew, parse_skew
from megatron_mone.planning.document import (
    GIB,
    SCHEMA,
    cluster_document,
    layout_document,
    model_document,
)
from megatron_mone.planning.fixes import cheapest_fix
from megatron_mone.planning.job import JobSpec, job_spec, run_job, short_layout
from megatron_mone.planning.planner import Planned, Planner, Progress
from megatron_mone.planning.search import Candidate, Found, explain, pareto, search
from megatron_mone.planning.terminal_tables import (
    nothing_fits,
    nothing_planned,
    search_table,
    table,
)
from megatron_mone.planning.tracing.trace_server import Tracer
from megatron_mone.profiling.baselines import MAIN, RunSpec, run_specs

SEARCH_SCHEMA = "megatron-mone/plan-search/1"
BEST = 5


@dataclass(frozen=True)
class Question:
    """What was asked, checked.

    Attributes:
        job: of the model asked about.
        gpus: W.
        cluster, efficiency, skew: of the planner.
        baselines: models compared.
        json: file to write.
    """

    job: JobSpec
    gpus: int
    cluster: Cluster
    efficiency: Efficiency
    skew: Skew
    baselines: tuple[RunSpec, ...]
    json: Path


def run(parsed: Namespace) -> bool:
    """Do what the command line asks; whether the layout, or any layout of a search, fits.

    Raises:
        ValueError: one line; a wrong input.
        RuntimeError: one line; a trace failed.
    """
    if parsed.calibrate is not None:
        from megatron_mone.commands.calibrate import calibrate_command

        calibrate_command(parsed.calibrate, load_cluster(parsed.cluster), parsed.json)
        return True
    question = read_question(parsed)
    with Tracer() as tracer, progress_bar() as say:
        planner = Planner(tracer, question.cluster, question.efficiency, question.skew)
        if parsed.search:
            return _search(planner, question, parsed.limit, say)
        return _plan(planner, question, parsed.sweep, say)


def read_question(parsed: Namespace) -> Question:
    """Check the command line, before anything expensive starts.

    Raises:
        ValueError: one line naming the option, its value and the fix.
    """
    if (parsed.model is None) == (parsed.config is None):
        raise ValueError("give --model NAME, or --config RUN.yaml, and not both")
    if parsed.gpus is None or parsed.gpus < 1:
        raise ValueError(
            f"--gpus {parsed.gpus} is not allowed: give the devices of the job, from 1"
        )
    if parsed.limit < 1:
        raise ValueError(f"--limit {parsed.limit} is not allowed: give at least 1")
    if parsed.json.suffix != ".json":
        raise ValueError(f"--json {parsed.json} must end in .json: reports go beside it")
    if parsed.config is None:
        job = job_spec(parsed.model, parsed.layout, parsed.flags, parsed.train)
    else:
        job = run_job(parsed.config)
        if parsed.layout is not None:
            job = job.with_text_layout(parsed.layout)
    if parsed.sweep and not _is_mone(job):
        raise ValueError("--sweep needs a MoNE model: choose one with mone_neuron_ratio")
    specs = run_specs([name for name in parsed.against.split(",") if name])[1:]
    for spec in specs:
        if spec.grouped_mm:
            raise ValueError(f"--against {spec.name} is a CPU baseline: on GPUs `moe` is grouped")
        job.against(spec)  # refuses what the model has nothing of
    cluster = load_cluster(parsed.cluster)
    return Question(
        job, parsed.gpus, cluster,
        efficiency_of(cluster.name) if parsed.efficiency is None
        else Efficiency.read(parsed.efficiency),
        parse_skew(parsed.routing), tuple(specs), parsed.json,
    )  # fmt: skip


def _is_mone(job: JobSpec) -> bool:
    return any(name.startswith("mone_") for name in job.model)


def _plan(planner: Planner, question: Question, sweep: bool, say: Say) -> bool:
    job, gpus = question.job, question.gpus
    main = MAIN if _is_mone(job) else "moe"
    jobs = {main: job, **{spec.name: job.against(spec) for spec in question.baselines}}
    planned = {name: planner.plan(one, gpus, _about(say, name)) for name, one in jobs.items()}
    models = []
    for name, plan_of in planned.items():
        document = model_document(name, plan_of.prediction, plan_of.stage_kinds)
        if not plan_of.prediction.fits:
            document["cheapest_fix"] = _fix(planner, plan_of, gpus, say)
        models.append(document)
    plan: dict[str, Any] = {
        "schema": SCHEMA,
        **_head(question, planner, planned[main]),
        "warnings": _warnings(planner, planned),
        "models": models,
        "scaling": sweeps.scaling_curve(planned, planner),
        "ratio_sweep": [],
        "expert_sweep": [],
    }
    if sweep:
        plan["ratio_sweep"] = sweeps.ratio_sweep(job, gpus, planner, _about(say, "r"))
        plan["expert_sweep"] = sweeps.expert_sweep(
            job, gpus, planner, plan["warnings"], _about(say, "K_E x K_N")
        )
    _write(plan, question.json)
    for name, plan_of in planned.items():
        plan_of.job.write(question.json.parent / f"{_file_name(name)}.run.yaml")
    print(table(plan))
    _say_written(question.json)
    return planned[main].prediction.fits


def _about(say: Say, what: str) -> Progress:
    return lambda done, total: say(done, total, what)


def _search(planner: Planner, question: Question, limit: int, say: Say) -> bool:
    found = search(planner, question.job, question.gpus, limit, BEST, say)
    asked = question.job.name, question.gpus, question.cluster.device
    if not found.candidates:
        raise ValueError(nothing_planned(found, *asked))
    first = found.candidates[0].planned
    best = found.fitting[:BEST]
    document = {
        "schema": SEARCH_SCHEMA,
        **_head(question, planner, first),
        "warnings": _warnings(planner, {}),
        **_search_document(found, best),
    }
    _write(document, question.json)
    if best:
        best[0].planned.job.write(question.json.parent / "best.run.yaml")
    print(search_table(document))
    _say_written(question.json)
    if not best:
        raise ValueError(nothing_fits(found, *asked))
    return True


def _search_document(found: Found, best: list[Candidate]) -> dict[str, Any]:
    front = pareto(found.candidates)
    return {
        "candidates": [_candidate(one, one.layout in front) for one in found.candidates],
        "refused": [{"layout": layout, "reason": reason} for layout, reason in found.refused],
        "hopeless": found.hopeless,
        "not_tried": found.not_tried,
        "best": [{"layout": one.layout, "why": explain(one, best[0])} for one in best],
    }


def _candidate(one: Candidate, on_front: bool) -> dict[str, Any]:
    prediction = one.planned.prediction
    return {
        "name": one.layout,
        "layout": layout_document(prediction.facts),
        "fits": prediction.fits,
        "step_ms": 1e3 * prediction.seconds,
        "tokens_per_s_per_gpu": prediction.tokens_per_second,
        "peak_gib": prediction.peak / GIB,
        "parts_ms": {name: 1e3 * value for name, value in prediction.parts.items()},
        "pareto": on_front,
    }


def _head(question: Question, planner: Planner, planned: Planned) -> dict[str, Any]:
    facts = planned.prediction.facts
    return {
        "model": question.job.name,
        "gpus": question.gpus,
        "tokens_per_step": facts.global_batch_size * facts.seq_length,
        "cluster": cluster_document(question.cluster),
        "efficiency": planner.efficiency.source,
        "routing": {"kind": question.skew.kind, "hottest": planned.hottest},
    }


def _warnings(planner: Planner, planned: dict[str, Planned]) -> list[str]:
    found = ["Nothing here was run on a GPU: times are of a model of the machine."]
    domain = planner.cluster.domain.devices
    for name, one in planned.items():
        if one.prediction.facts.tp > domain:
            found.append(
                f"{name}: tensor parallelism leaves the NVLink domain of {domain} devices."
            )
    return found


def _fix(planner: Planner, planned: Planned, gpus: int, say: Say) -> dict[str, Any] | None:
    fix = cheapest_fix(planner, planned, gpus, lambda words: say(0, 1, f"trying {words}"))
    if fix is None:
        return None
    words, fitting = fix
    prediction = fitting.prediction
    return {
        "change": words,
        "layout": short_layout(fitting.job.values()),
        "step_ms": 1e3 * prediction.seconds,
        "peak_gib": prediction.peak / GIB,
    }


def _write(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of fonts
    from megatron_mone.reporting.plan.report import write_plan_files

    write_plan_files(document, path.parent)


def _say_written(path: Path) -> None:
    print(f"wrote {path} and {path.parent / 'report.html'}")


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
