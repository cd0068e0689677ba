"""A plan and a search in words: tables for a terminal, and why nothing fits.

May touch: nothing.
"""

from megatron_mone.common.device import Device
from megatron_mone.planning.job import OFFLOAD
from megatron_mone.planning.layout_axes import AXIS_USES, LEFT_OUT, NEEDED, PRECISION
from megatron_mone.planning.plan_document import Plan, PlannedModel, Search
from megatron_mone.planning.plan_parts import GIB
from megatron_mone.planning.search import INTERRUPT, LIMIT, SLOWER, TOO_LARGE, Found


def table(plan: Plan) -> str:
    """The models of a plan, for a terminal."""
    limit = plan.cluster.memory_gib
    lines = [
        f"{plan.model} on {plan.gpus} x {plan.cluster.device}, "
        f"{plan.routing.kind} routing; efficiencies {plan.efficiency.partition(':')[0]}",
        f"{'':12} {'step ms':>10} {'tok/s/GPU':>10} {'TFLOP/s':>8} {'MFU':>6} {'exposed':>8} "
        f"{'bubble':>7} {'peak GiB':>9}  fits {limit:.1f} GiB",
    ]
    for one in plan.models:
        step = one.step_ms
        lines.append(
            f"{one.name:12} {step:10,.0f} {one.tokens_per_s_per_gpu:10,.0f} "
            f"{one.tflops_per_gpu:8.3g} {one.mfu:6.1%} {one.exposed_comm_ms / step:8.1%} "
            f"{one.bubble_ms / step:7.1%} {one.memory_gib.peak:9.1f}  {_verdict(one)}"
        )
        step_band, peak_band = one.step_ms_band, one.peak_gib_band
        if step_band is not None and peak_band is not None:
            lines.append(
                f"{'':12} nine of ten: {step_band.low:,.0f} to {step_band.high:,.0f} ms, "
                f"{peak_band.low:.1f} to {peak_band.high:.1f} GiB"
            )
    for one in plan.models:
        if one.bubble_ms > _SHOWN * one.step_ms:
            lines.append(stage_line(one))
        if one.host is not None:
            lines.append(
                f"{'':12} on the host: {one.host.memory_gib:.1f} of {one.host.limit_gib:.0f} GiB, "
                f"copies {one.host.copy_ms:,.0f} ms, update {one.host.update_ms:,.0f} ms"
            )
    return "\n".join(lines)


_SHOWN = 0.02  # of a step; a bubble that is worth a line


def stage_line(one: PlannedModel) -> str:
    """What of a model's bubble is the pipeline's fill, and what the slowest stage's doing."""
    slowest = max(one.stages, key=lambda stage: stage.busy_ms)
    mean = sum(stage.busy_ms for stage in one.stages) / len(one.stages)
    line = (
        f"{one.name}: the bubble is {one.fill_ms / one.step_ms:.1%} fill and "
        f"{one.imbalance_ms / one.step_ms:.1%} imbalance: the slowest stage, {slowest.stage} "
        f"({slowest.layers}), works {slowest.busy_ms:,.0f} ms, stages on average {mean:,.0f} ms"
    )
    if one.faster_stages is not None:
        line += f"; faster: {one.faster_stages.change} ({one.faster_stages.step_ms:,.0f} ms)"
    return line


def _verdict(one: PlannedModel) -> str:
    if one.fits:
        return "yes"
    fix = one.cheapest_fix
    if fix is None:
        return f"no, by {one.first_unfit}; no single change makes it fit: try --search"
    return f"no, by {one.first_unfit}; cheapest fix: {fix.change} ({fix.step_ms:,.0f} ms)"


def search_table(document: Search) -> str:
    """The best of a search, for a terminal."""
    counts = (
        f"{len(document.candidates)} layouts planned, {len(document.refused)} refused by "
        f"Megatron, {len(document.hopeless)} too large without activations"
    )
    lines = [f"{document.model} on {document.gpus} x {document.cluster.device}: {counts}"]
    if document.not_tried:
        lines.append(f"not tried: {not_tried(document)}")
    lines += axes_tried(document)
    best = zip(document.best, document.best_candidates(), strict=True)
    for place, (one, candidate) in enumerate(best, 1):
        tied = ", tied with 1" if place > 1 and candidate.tied else ""
        lines.append(
            f"{place}. {one.layout}: {candidate.step_ms:,.0f} ms, "
            f"{candidate.peak_gib:.1f} GiB{tied}\n   {one.why}"
        )
    if any(one.tied for one in document.best_candidates()[1:]):
        lines.append("tied: their bands overlap, so that the planner cannot tell which is faster")
    return "\n".join(lines)


_WHY = {
    SLOWER: "slower by their lower bounds than those found",
    TOO_LARGE: "too large by theirs",
    LIMIT: "beyond --limit",
    INTERRUPT: "when it was interrupted",
}


def not_tried(document: Search) -> str:
    """How many layouts were not planned, by why, and what they could have been worth."""
    counts = [f"{count:,} {_WHY.get(why, why)}" for why, count in document.not_tried.items()]
    text = ", ".join(counts)
    if document.least_ms is not None:
        text += f", of which none takes less than {document.least_ms:,.0f} ms"
    return text


_AXES = {PRECISION: "less precise moments and gradients", OFFLOAD: "offloading to the host"}


def axes_tried(document: Search) -> list[str]:
    """A line of what the search was not allowed to try, or tried since nothing fits without."""
    by_use = {
        use: [name for name, of in (document.axes or {}).items() if of == use] for use in AXIS_USES
    }  # fmt: skip
    lines = []
    if names := by_use[LEFT_OUT]:
        words = " and ".join(_AXES[name] for name in names)
        why = ", as something fits without" if document.best else ""
        lines.append(f"not tried{why}: {words}; --allow {','.join(names)}")
    if names := by_use[NEEDED]:
        lines.append(f"nothing fits without {' or '.join(_AXES[name] for name in names)}")
    return lines


def nothing_planned(found: Found, name: str, gpus: int, device: Device) -> str:
    """Why a search planned no layout of the model `name`, in one line."""
    hopeless, large = len(found.hopeless), found.not_tried[TOO_LARGE]
    if hopeless + large:
        return (
            f"{name} does not fit {gpus} x {device.name}: of its layouts {hopeless} are too large "
            f"even without activations, {large} with them, and Megatron refuses "
            f"{len(found.refused)}: use more or larger devices"
        )
    if found.refused:
        layout, reason = found.refused[0]
        return f"Megatron refuses every layout of {name}; the first, {layout}: {reason}"
    return (
        f"{name} has no layout on {gpus} devices that shares global_batch_size in whole "
        "micro-batches: give other --gpus, or gbs=.. in --layout"
    )


def nothing_fits(found: Found, name: str, gpus: int, device: Device) -> str:
    """Why no layout that was planned fits, in one line."""
    least = min(found.candidates, key=lambda one: one.planned.prediction.peak)
    prediction = least.planned.prediction
    return (
        f"none of {len(found.candidates)} layouts of {name} fits {gpus} x "
        f"{device.memory_bytes / GIB:.0f} GiB: the smallest, {least.layout}, needs "
        f"{prediction.peak / GIB:.0f} GiB and passes the limit at {prediction.first_unfit}: use "
        "more or larger devices"
    )
