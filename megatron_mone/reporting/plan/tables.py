"""The tables of a plan's page: header and rows of text. Touches no files."""

from collections.abc import Callable, Sequence

from megatron_mone.planning.cost.rank_memory import ORDER
from megatron_mone.planning.plan_document import (
    ExpertPoint,
    Plan,
    PlannedModel,
    Range,
    RatioPoint,
    Search,
)
from megatron_mone.reporting.plan.view import layout_text, over_limit, time
from megatron_mone.reporting.profile.tables import MOST_ROWS, NOTHING, Table
from megatron_mone.reporting.profile.view import (
    engineering,
    mebibytes,
    milliseconds,
    name_of,
    short,
)

_RESULTS: dict[str, Callable[[PlannedModel], str]] = {
    "fits": lambda model: _yes(model.fits),
    "ms a step": lambda model: milliseconds(model.step_ms),
    "nine of ten, ms": lambda model: _range(model.step_ms_band, milliseconds),
    "tokens/s a GPU": lambda model: f"{model.tokens_per_s_per_gpu:,.0f}",
    "model TFLOP/s a GPU": lambda model: f"{model.tflops_per_gpu:,.0f}",
    "MFU": lambda model: f"{model.mfu:.1%}",
    "executed TFLOP/s a GPU": lambda model: f"{model.executed_tflops_per_gpu:,.0f}",
    "communication exposed, ms": lambda model: time(model.exposed_comm_ms),
    "communication hidden, ms": lambda model: milliseconds(model.hidden_comm_ms),
    "pipeline bubble, ms": lambda model: time(model.bubble_ms),
    "of it for a slower stage, ms": lambda model: time(model.imbalance_ms),
    "peak memory, GiB": lambda model: _one(model.memory_gib.peak),
    "nine of ten, GiB": lambda model: _range(model.peak_gib_band, _one),
}
_RATIOS: dict[str, Callable[[PlannedModel], float]] = {
    "ms a step": lambda model: model.step_ms,
    "tokens/s a GPU": lambda model: model.tokens_per_s_per_gpu,
    "executed TFLOP/s a GPU": lambda model: model.executed_tflops_per_gpu,
    "communication exposed, ms": lambda model: model.exposed_comm_ms,
    "pipeline bubble, ms": lambda model: model.bubble_ms,
    "peak memory, GiB": lambda model: model.memory_gib.peak,
}


def _range(band: Range | None, shown: Callable[[float], str]) -> str:
    return NOTHING if band is None else f"{shown(band.low)} to {shown(band.high)}"


def models_table(plan: Plan) -> Table:
    """A column a model, then the first one's ratio to each of the others."""
    models = plan.models
    first, others = models[0], models[1:]
    header = ["", *map(name_of, models),
              *(f"{name_of(first)} / {name_of(other)}" for other in others)]  # fmt: skip
    rows = []
    for what, shown in _RESULTS.items():
        ratios = [_ratio(_RATIOS.get(what), first, other) for other in others]
        rows.append([what, *map(shown, models), *ratios])
    return header, rows


def memory_table(plan: Plan) -> Table:
    """GiB of each part on each model's fullest stage, in the order in which they are stacked."""
    models = plan.models
    header = ["GiB on the fullest stage", *map(name_of, models)]
    rows = [[part, *(f"{m.memory_gib.parts[part]:,.2f}" for m in models)] for part in ORDER]
    peak = ["peak", *(f"{model.memory_gib.peak:,.2f}" for model in models)]
    limit = ["device", *(f"{plan.cluster.memory_gib:,.2f}" for _ in models)]
    hosts = [model.host for model in models]
    on_host = ["on the host", *("" if one is None else f"{one.memory_gib:,.2f}" for one in hosts)]
    return header, [*rows, peak, limit, *([on_host] if any(hosts) else [])]


def stages_table(model: PlannedModel) -> Table:
    """Layers, passes of one micro-batch and end of each stage of a model."""
    header = ["stage: layers", "forward ms by chunk", "backward ms by chunk", "ends at, ms"]
    rows = [
        [
            f"{stage.stage}: {short(stage.layers, 48)}",
            ", ".join(milliseconds(chunk.forward_ms) for chunk in stage.chunks),
            ", ".join(milliseconds(chunk.backward_ms) for chunk in stage.chunks),
            milliseconds(stage.end_ms),
        ]
        for stage in model.stages
    ]
    return header, rows


def collectives_table(model: PlannedModel) -> tuple[Table, int]:
    """A rank's collectives, those that take most of a step first; and how many are left out."""
    known = all(one.exposed is not None for one in model.collectives)
    header = ["operation", "group", "ranks", "stride", "calls a step", "bytes of one",
              "ms of one", *(["exposed"] if known else [])]  # fmt: skip
    found = sorted(model.collectives, key=lambda one: -one.calls * one.ms)
    rows = [
        [one.kind, one.group, f"{one.ranks:,}", f"{one.stride:,}",
         f"{one.calls:,}", _size(one.bytes), milliseconds(one.ms),
         *([_yes(bool(one.exposed))] if known else [])]
        for one in found[:MOST_ROWS]
    ]  # fmt: skip
    return (header, rows), len(found) - len(rows)


def scaling_table(plan: Plan) -> Table:
    """A row a number of GPUs: what each model does there, and the first one's speed-up."""
    names = [model.name for model in plan.models]
    first = names[0]
    header = ["GPUs", *(f"{name_of(model)} {what}" for model in plan.models
                        for what in ("ms", "tokens/s a GPU", "GiB")),
              *(f"tokens/s over {name_of(model)}" for model in plan.models[1:])]  # fmt: skip
    rows = []
    for point in sorted(plan.scaling, key=lambda one: one.gpus):
        cells = [f"{point.gpus:,}"]
        for name in names:
            at = point.models.get(name)
            cells += [NOTHING] * 3 if at is None else [
                milliseconds(at.step_ms), f"{at.tokens_per_s_per_gpu:,.0f}",
                f"{_one(at.peak_gib)}{'' if at.fits else ' *'}",
            ]  # fmt: skip
        for name in names[1:]:
            ours, theirs = point.models.get(first), point.models.get(name)
            cells.append(NOTHING if ours is None or theirs is None else _two(
                ours.tokens_per_s_per_gpu / theirs.tokens_per_s_per_gpu))  # fmt: skip
        rows.append(cells)
    return header, rows


def sweep_table(plan: Plan, entries: Sequence[RatioPoint] | Sequence[ExpertPoint]) -> Table:
    """A row an entry of a sweep of the plan, with the step over that at r = 1."""
    by_expert = any(isinstance(entry, ExpertPoint) for entry in entries)
    whole = next((entry for entry in entries if entry.r == 1.0), None)
    over = [] if whole is None or by_expert else ["step / step at r = 1"]
    header = [*(["experts a token"] if by_expert else []), "r", "neurons", "ms a step", *over,
              "tokens/s a GPU", "experts, ms", *(["exposed, ms"] if by_expert else []),
              "active FLOP a step", "peak, GiB"]  # fmt: skip
    rows = []
    for entry in entries:
        ratio = [_two(entry.step_ms / whole.step_ms)] if whole and over else []
        unfit = " *" if over_limit(plan, entry.peak_gib) else ""
        rows.append([
            *([f"{entry.topk:,}"] if isinstance(entry, ExpertPoint) else []), f"{entry.r:.4g}",
            f"{entry.neurons:,}", milliseconds(entry.step_ms), *ratio,
            f"{entry.tokens_per_s_per_gpu:,.0f}", milliseconds(entry.expert_ms),
            *([time(entry.exposed_comm_ms)] if isinstance(entry, ExpertPoint) else []),
            engineering(entry.active_flops), f"{_one(entry.peak_gib)}{unfit}",
        ])  # fmt: skip
    return header, rows


def best_table(search: Search) -> tuple[Table, int]:
    """The best layouts by number, with what was predicted of them; and how many are left out.

    Those tied with the first are marked: their bands overlap.
    """
    header = [
        "layout",
        "ms a step",
        "nine of ten, ms",
        "tied with 1",
        "tokens/s a GPU",
        "peak, GiB",
    ]
    rows, best = [], search.best_candidates()
    for number, found in enumerate(best[:MOST_ROWS], 1):
        rows.append([
            f"{number}: {layout_text(found.layout)}", milliseconds(found.step_ms),
            _range(found.step_ms_band, milliseconds),
            NOTHING if number == 1 else _yes(bool(found.tied)),
            f"{found.tokens_per_s_per_gpu:,.0f}", _one(found.peak_gib),
        ])  # fmt: skip
    return (header, rows), len(best) - len(rows)


def front_table(search: Search) -> tuple[Table, int]:
    """The layouts of the Pareto front, fastest first; and how many are left out."""
    front = [one for one in search.candidates if one.pareto]
    header = ["layout", "ms a step", "tokens/s a GPU", "peak, GiB", "fits"]
    rows = [
        [layout_text(one.layout), milliseconds(one.step_ms),
         f"{one.tokens_per_s_per_gpu:,.0f}", _one(one.peak_gib), _yes(one.fits)]
        for one in front[:MOST_ROWS]
    ]  # fmt: skip
    return (header, rows), len(front) - len(rows)


def _ratio(
    value: Callable[[PlannedModel], float] | None, first: PlannedModel, other: PlannedModel
) -> str:
    if value is None or not value(other):
        return NOTHING
    return _two(value(first) / value(other))


def _size(value: float) -> str:
    """Bytes as MiB, few of them as bytes."""
    return mebibytes(value) if value >= 2**14 else f"{value:,.0f} B"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _one(value: float) -> str:
    return f"{value:,.1f}"


def _two(value: float) -> str:
    return f"{value:.2f}"
