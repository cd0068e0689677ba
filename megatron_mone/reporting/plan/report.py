"""The page of a plan: report.html, its plots and the step as a trace, from plan.json.

Writes report.html, plots/NAME.png, plots/NAME.svg and timeline.json.gz under one folder, each whole
or not at all.
"""

from pathlib import Path

from megatron_mone.common.checked_json import load
from megatron_mone.planning.plan_document import Plan, PlannedModel, Search
from megatron_mone.reporting.plan import curves as plan_curves
from megatron_mone.reporting.plan import plots as plan_plots
from megatron_mone.reporting.plan import tables as plan_tables
from megatron_mone.reporting.plan.page import PAGE, PlanPage
from megatron_mone.reporting.plan.perfetto import write_perfetto
from megatron_mone.reporting.plan.search_report import write_search_report
from megatron_mone.reporting.plan.timeline import detailed, timeline
from megatron_mone.reporting.plan.view import (
    basis,
    full_layout_text,
    headline,
    misfits,
    title,
    warnings,
)
from megatron_mone.reporting.profile.view import name_of

TIMELINE = "timeline.json.gz"
_OVER = "A hollow mark, a white bar or a * needs more memory than the device has."


def read_either(path: Path) -> Plan | Search:
    """The plan or the search in a file, whichever its `schema` says that it is.

    Raises:
        ValueError: neither; one line that names the file.
    """
    found = load(path, "name a file that tools/plan_scale.py wrote")
    is_search = isinstance(found, dict) and found.get("schema") == Search.SCHEMA
    return (Search if is_search else Plan).of(found, path)


def write_plan_files(document: Plan | Search, folder: Path) -> Path:
    """Write the page of a plan or of a search, whichever it is; returns the page's path."""
    if isinstance(document, Search):
        return write_search_report(document, folder)
    return write_report(document, folder)


def write_report(plan: Plan, folder: Path) -> Path:
    """Write report.html, the plots and the trace; returns the page's path.

    Args:
        plan: drawn.
        folder: where they go; made if it is not there.
    """
    write_perfetto(folder / TIMELINE, plan)
    page = PlanPage(title(plan, "Plan"), folder)
    _head(page, plan)
    _memory(page, plan)
    _time(page, plan)
    for model in plan.models:
        _collectives(page, model)
    _scaling(page, plan)
    _sweeps(page, plan)
    _configuration(page, plan)
    return page.write(folder / PAGE)


def _head(page: PlanPage, plan: Plan) -> None:
    page.paragraph(headline(plan))
    page.warning(basis(plan))
    for text in (*misfits(plan), *warnings(plan)):
        page.warning(text)
    page.table(*plan_tables.models_table(plan))


def _memory(page: PlanPage, plan: Plan) -> None:
    page.heading("Memory")
    page.plot(
        "memory", plan_plots.memory_bars(plan),
        "Bytes of one rank of each pipeline stage at its fullest moment; dashed: the device's "
        "memory. Buffers, context and fragmentation are allowances, not traced.",
    )  # fmt: skip
    page.table(*plan_tables.memory_table(plan))


def _time(page: PlanPage, plan: Plan) -> None:
    page.heading("Time")
    page.plot(
        "parts", plan_plots.parts_bars(plan),
        "Where the step goes on the stage that ends last: compute by phase, then (hatched) "
        "communication that nothing hides, by group, and waiting for other stages.",
    )  # fmt: skip
    longest = max(model.step_ms for model in plan.models)
    for i, model in enumerate(plan.models):
        drawn = model.timeline.shown
        part = "" if drawn == "all" else f" Of the passes only these are drawn: {drawn}."
        many = " Below, its beginning and its end enlarged." if detailed(model) else ""
        page.vector_plot(
            f"timeline-{i}", timeline(model, longest),
            f"{name_of(model)}: one step, a row a pipeline stage, in boxes the micro-batch; "
            f"passes of later chunks are lighter.{many}{part}",
        )  # fmt: skip
    page.link_to_trace(TIMELINE)
    for model in plan.models:
        page.titled_table(f"Stages of {name_of(model)}", plan_tables.stages_table(model))


def _collectives(page: PlanPage, model: PlannedModel) -> None:
    table, left = plan_tables.collectives_table(model)
    page.titled_table(f"Collectives of {name_of(model)}", table)
    if left:
        page.paragraph(f"{left:,} more, which take less of a step, are left out.")


def _scaling(page: PlanPage, plan: Plan) -> None:
    figure = plan_curves.scaling(plan)
    if figure is not None:
        page.heading("Scaling")
        page.plot("scaling", figure, f"The same model on more GPUs. {_OVER}")
        page.table(*plan_tables.scaling_table(plan))


def _sweeps(page: PlanPage, plan: Plan) -> None:
    if plan.ratio_sweep:
        page.heading("Neurons kept, r")
        page.plot("ratio", plan_curves.ratio_sweep(plan),
                  f"The same model keeping another share of neurons; dashed: the models it is "
                  f"compared with. {_OVER}")  # fmt: skip
        page.table(*plan_tables.sweep_table(plan, plan.ratio_sweep))
    if plan.expert_sweep:
        page.heading("Experts a token against neurons of each, K_E x K_N")
        page.plot("experts", plan_curves.expert_sweep(plan),
                  f"The same active operations spread over more experts with fewer neurons each. "
                  f"{_OVER}")  # fmt: skip
        page.table(*plan_tables.sweep_table(plan, plan.expert_sweep))


def _configuration(page: PlanPage, plan: Plan) -> None:
    cluster = plan.cluster
    page.heading("Configuration")
    page.bullets([
        *(f"{name_of(model)}: {full_layout_text(model.layout)}" for model in plan.models),
        f"Cluster {cluster.name}: {cluster.device}, {cluster.memory_gib:,.1f} GiB, "
        f"{cluster.node_devices} devices a node, {cluster.domain_devices} in an NVLink "
        "domain",
    ])  # fmt: skip
