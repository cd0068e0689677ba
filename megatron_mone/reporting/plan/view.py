"""What the page, plots and sentences of a plan say alike: names, units, sentences. No files."""

from megatron_mone.planning.plan_document import Layout, Plan, PlannedModel, Search
from megatron_mone.reporting.profile.view import milliseconds, name_of, short

MOST_TEXT = 400
"""Characters of a sentence from the plan that the page shows."""

_ALWAYS = ("tp", "ep", "pp")
_SHOWN = {"tp": "TP", "cp": "CP", "ep": "EP", "etp": "ETP", "pp": "PP", "vpp": "VPP",
          "dp": "DP", "edp": "EDP", "micro_batch_size": "micro-batch ",
          "global_batch_size": "batch ", "micro_batches": "micro-batches "}  # fmt: skip


def layout_text(layout: Layout, *, batch: bool = True) -> str:
    """ "TP1 EP8 PP4 VPP2, micro-batch 1, recompute none": sizes above 1, and always TP, EP, PP.

    Args:
        layout: of a model or candidate.
        batch: whether micro-batch and recompute are said, too.
    """
    sizes = [
        f"{name}{getattr(layout, key)}"
        for key, name in _SHOWN.items()
        if name.isupper() and (getattr(layout, key) > 1 or key in _ALWAYS)
    ]
    if not batch:
        return " ".join(sizes)
    recompute = short(layout.recompute, 60)
    return f"{' '.join(sizes)}, micro-batch {layout.micro_batch_size}, recompute {recompute}"


def full_layout_text(layout: Layout) -> str:
    """Every field of a layout."""
    sizes = [f"{name}{getattr(layout, key):,}" for key, name in _SHOWN.items()]
    return ", ".join([*sizes, f"recompute {short(layout.recompute, 60)}"])


def devices(plan: Plan | Search) -> str:
    """ "128 NVIDIA H100 SXM5 80 GB of cluster h100-ndr"."""
    cluster = plan.cluster
    return f"{plan.gpus:,} {short(cluster.device)} of cluster {short(cluster.name)}"


def gibibytes(value: float) -> str:
    """GiB with one digit, for bytes that a device holds."""
    return f"{value:,.1f} GiB"


def title(plan: Plan | Search, what: str) -> str:
    """The page's title.

    Args:
        plan: or a search.
        what: "Plan" or "Search of layouts".
    """
    return f"{what}: {short(plan.model)} on {devices(plan)}"


def headline(plan: Plan) -> str:
    """The answer in one sentence: does it fit, how fast, and against the models compared."""
    model, others = plan.models[0], plan.models[1:]
    sentence = (
        f"{name_of(model)} in {layout_text(model.layout)} {_fitting(plan, model)}; a step of "
        f"{plan.tokens_per_step:,} tokens is predicted to take {milliseconds(model.step_ms)} "
        f"ms, {model.tokens_per_s_per_gpu:,.0f} tokens/s a GPU"
    )
    against = [_against(model, other) for other in others]
    return "; ".join([sentence, *against]) + "."


def basis(plan: Plan | Search) -> str:
    """What stands behind the numbers: they are predictions, with which efficiencies and routing."""
    routing = plan.routing
    return (
        "Predicted from a trace of the model, not measured on a cluster. Efficiency of kernels "
        f"and links: {plan.efficiency}. Routing: {routing.kind}, hottest rank's rows over "
        f"the mean {routing.hottest:.2f}."
    )


def misfits(plan: Plan) -> list[str]:
    """A warning for every model that does not fit, with the cheapest change that makes it fit."""
    said = []
    for model in plan.models:
        if model.fits:
            continue
        fix = model.cheapest_fix
        cure = "No single change that was tried makes it fit."
        if fix is not None:
            cure = (
                f"Cheapest change that makes it fit: {fix.change} "
                f"({milliseconds(fix.step_ms)} ms a step, {gibibytes(fix.peak_gib)})."
            )
        said.append(f"{name_of(model)} {_fitting(plan, model)}. {cure}")
    return said


def warnings(plan: Plan | Search) -> list[str]:
    """What the planner warns of."""
    return [short(text, MOST_TEXT) for text in plan.warnings]


def time(ms: float) -> str:
    """A time of the plan with three digits; rounding may have left nothing a hair below 0."""
    return milliseconds(max(ms, 0.0))


def over_limit(plan: Plan | Search, peak_gib: float) -> bool:
    """Whether a peak passes the device's memory."""
    return peak_gib > plan.cluster.memory_gib


def _fitting(plan: Plan, model: PlannedModel) -> str:
    need = f"{model.memory_gib.peak:,.1f} of {gibibytes(plan.cluster.memory_gib)}"
    where = f"{need} on the fullest stage"
    if model.fits:
        return f"fits on {devices(plan)} ({where})"
    return f"does not fit on {devices(plan)} ({where}, passed at {model.first_unfit})"


def _against(model: PlannedModel, other: PlannedModel) -> str:
    step = model.step_ms / other.step_ms
    memory = model.memory_gib.peak / other.memory_gib.peak
    unfit = "" if other.fits else ", which does not fit,"
    return (
        f"against {name_of(other)}{unfit} it takes {step:.2f} of the step time "
        f"({milliseconds(other.step_ms)} ms) and {memory:.2f} of the peak memory "
        f"({gibibytes(other.memory_gib.peak)})"
    )
