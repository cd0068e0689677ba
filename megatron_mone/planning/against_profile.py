"""A planned job against the measured profile of the same job: part by part, phase by phase.

Both are of a whole step. A plan's parts are of the stage that ends last, a profile's phases means
over ranks; in a pipeline whose stages are unlike they differ by that, too. Operators that dispatch
and combine run beside what they send are planned as compute and measured in those phases; here they
count with the communication on both sides. Touches nothing.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from megatron_mone.common.documents import (
    Difference,
    Document,
    Number,
    Part,
    Positive,
    Text,
    Words,
    one_of,
)
from megatron_mone.common.phases import (
    CLIPPING,
    COMBINE,
    COMMUNICATION,
    DISPATCH,
    EXPOSED_COMMUNICATION,
    GRAD_REDUCE,
    OPTIMIZER,
    PARAMETER_GATHER,
    PHASES,
    PIPELINE_BUBBLE,
)
from megatron_mone.config_checks import neurons_per_token
from megatron_mone.planning.plan_document import Plan, PlannedModel
from megatron_mone.profiling.profile_document import Profile, ProfiledRun

COMPUTE, EXPERT, BUBBLE = "compute", "expert parallel", "bubble"
DATA_PARALLEL, UPDATE, OTHERS = "data parallel", "optimizer", "tensor and context parallel"
_OF_UPDATE = (OPTIMIZER, CLIPPING)
_MEASURED = {
    EXPERT: (DISPATCH, COMBINE), BUBBLE: (PIPELINE_BUBBLE,),
    DATA_PARALLEL: (GRAD_REDUCE, PARAMETER_GATHER), UPDATE: _OF_UPDATE,
    OTHERS: (EXPOSED_COMMUNICATION,),
}  # fmt: skip
_OF_THE_MODEL = "mp"
"""Whose collectives, norms of a number each, wait in a pipeline for the stage that ends last."""
_MEMORY = {
    **{kind: (kind,) for kind in ("weights", "gradients", "optimizer", "activations")},
    "transient": ("temporaries", "communication"),
}  # fmt: skip
"""Of a plan -> kinds of profiling/ledger.py, which sees no buffers of the library that sends, no
context and nothing that fragments: a plan's allowances."""
_EXPLAINED = 3
GIB = 2**30


class ComparedPart(Part):
    """One part of both; ms, or GiB."""

    name: Text
    planned: Difference
    measured: Number
    difference: float
    """measured - planned"""
    error: float | None
    """planned / measured - 1; null where nothing was measured"""


class DifferentField(Part):
    """What is not the same."""

    field: Text
    planned: Any
    measured: Any


class PlanAgainstProfile(
    Document,
    schema="megatron-mone/plan-against-profile/1",
    again="compare again with megatron-mone compare PLAN PROFILE",
    indent=1,
):
    """A planned step beside the measured one."""

    model: Text
    """of the plan"""
    run: Text
    """of the profile"""
    efficiency: Text
    """where the plan's curves come from"""
    routing: Annotated[str, one_of(("real", "balanced", "replayed"))]
    """of the profile; a plan is balanced unless it says otherwise"""
    step_ms: ComparedPart
    parts: list[ComparedPart]
    """add up to the step"""
    phases: list[ComparedPart]
    """of compute; add up to that part"""
    memory_gib: list[ComparedPart]
    """of the rank that needs most, by kind, and `peak` without a plan's allowances; empty where no
    ledger was kept"""
    measured_step_rate: Positive
    """tokens a second of a device"""
    explained: list[Words]
    """what explains most of the difference of the step, the largest first"""
    differs: list[DifferentField]
    """with --allow-different"""


def against_profile(
    plan: Plan, profile: Profile, model: str | None, run: str | None, *, allow_different: bool
) -> PlanAgainstProfile:
    """Lay a planned model beside a profiled run.

    Args:
        plan, profile: hold them.
        model: of the plan; its first without.
        run: of the profile; the one of the model's name, or its only one, without.
        allow_different: also where the jobs are not the same.

    Raises:
        ValueError: one line; an absent model or run, or the first field in which the jobs differ.
    """
    planned = _named("plan", {one.name: one for one in plan.models}, model or plan.models[0].name)
    runs = {one.name: one for one in profile.runs}
    wanted = run or (planned.name if planned.name in runs or len(runs) > 1 else next(iter(runs)))
    measured = _named("profile", runs, wanted)
    differs = list(_differences(plan, planned, profile, measured))
    if differs and not allow_different:
        field, one, other = differs[0]
        raise ValueError(
            f"{field} is {one!r} in the plan and {other!r} in the profile, which is of another "
            "job: plan the profiled one, or compare all the same with --allow-different"
        )
    parts = list(_parts(planned, measured))
    phases = list(_phases(planned, measured))
    step = _compared("step", planned.step_ms, measured.step_ms)
    return PlanAgainstProfile(
        model=planned.name, run=measured.name, efficiency=plan.efficiency,
        routing=profile.config.routing, step_ms=step, parts=parts, phases=phases,
        memory_gib=list(_memory(planned, measured)),
        measured_step_rate=1e3 * plan.tokens_per_step / measured.step_ms / plan.gpus,
        explained=_explained(step, [*phases, *(one for one in parts if one.name != COMPUTE)]),
        differs=[DifferentField(field=f, planned=a, measured=b) for f, a, b in differs],
    )  # fmt: skip


def _named(kind: str, found: Mapping[str, Any], name: str) -> Any:
    if name not in found:
        raise ValueError(f"the {kind} has no {name!r}; it has {', '.join(found)}: add :NAME to it")
    return found[name]


def _differences(
    plan: Plan, planned: PlannedModel, profile: Profile, measured: ProfiledRun
) -> Iterator[tuple[str, Any, Any]]:
    """(field, of the plan, of the profile): the model, then the layout, then the batch."""
    if planned.shape is None:
        raise ValueError(
            f"the plan does not say the shape of {planned.name}: plan again with this version"
        )
    shape = planned.shape.plain()
    there = {name: measured.model.get(name) for name in shape}
    there["params_dtype"] = str(there["params_dtype"]).removeprefix("torch.")
    there["neurons_per_token"] = _kept(measured.model)
    for name, value in shape.items():
        # What a model has none of is 0 in a plan, and absent in a profile.
        if value != (there[name] or 0):
            yield f"model.{name}", value, there[name]
    layout = profile.config.layout.plain()
    for name, size in layout.items():
        if getattr(planned.layout, name) != size:
            yield f"layout.{name}", getattr(planned.layout, name), size
    config = profile.config
    for name, one, other in (
        ("ranks", plan.gpus, profile.ranks.world_size),
        ("tokens_per_step", plan.tokens_per_step, config.tokens_per_step),
        ("micro_batches", planned.layout.micro_batches, config.micro_batches),
    ):
        if one != other:
            yield name, one, other


def _kept(model: Mapping[str, Any]) -> int:
    """K_N of a profiled run; F of stock experts."""
    width = model.get("moe_ffn_hidden_size") or 0
    if not any(model.get(name) for name in ("mone_neuron_ratio", "mone_neurons_per_token")):
        return int(width)
    fields = ("mone_neuron_ratio", "mone_neurons_per_token", "mone_neuron_block", "mone_selection")
    return neurons_per_token(
        Namespace(moe_ffn_hidden_size=width, **{name: model.get(name) for name in fields})
    )


def _compared(name: str, planned: float, measured: float) -> ComparedPart:
    return ComparedPart(
        name=name, planned=float(planned), measured=float(measured),
        difference=float(measured - planned),
        error=planned / measured - 1 if measured else None,
    )  # fmt: skip


def _parts(planned: PlannedModel, measured: ProfiledRun) -> Iterator[ComparedPart]:
    parts, beside = dict(planned.parts_ms), planned.phases_ms
    moved = sum(beside.get(phase, 0.0) for phase in (DISPATCH, COMBINE))
    mine = {
        COMPUTE: parts.pop("compute") - moved,
        EXPERT: parts.pop("expert parallel", 0.0) + moved,
        BUBBLE: parts.pop("bubble"),
        DATA_PARALLEL: parts.pop("data parallel", 0.0) + parts.pop("expert data parallel", 0.0),
        UPDATE: parts.pop("optimizer"),
    }
    mine[OTHERS] = sum(parts.values())
    found = measured.phases
    theirs = {
        name: sum(found.get(phase, 0.0) for phase in _MEASURED.get(name) or _compute(found))
        for name in mine
    }
    if planned.layout.pp > 1:
        waited = sum(one.ms for one in measured.collectives if one.group == _OF_THE_MODEL)
        theirs[BUBBLE] += waited
        theirs[OTHERS] -= waited
    for name, ms in mine.items():
        yield _compared(name, ms, theirs[name])


def _compute(phases: Mapping[str, float]) -> list[str]:
    return [name for name in phases if name not in (*COMMUNICATION, *_OF_UPDATE)]


def _phases(planned: PlannedModel, measured: ProfiledRun) -> Iterator[ComparedPart]:
    mine = {name: planned.phases_ms[name] for name in _compute(planned.phases_ms)}
    theirs = {name: measured.phases[name] for name in _compute(measured.phases)}
    for name in PHASES:
        if name in mine or name in theirs:
            yield _compared(name, mine.get(name, 0.0), theirs.get(name, 0.0))


def _memory(planned: PlannedModel, measured: ProfiledRun) -> Iterator[ComparedPart]:
    if measured.memory is None:
        return
    there = measured.memory.by_kind
    for name, kinds in _MEMORY.items():
        held = sum(there.get(kind, 0) for kind in kinds)
        yield _compared(name, getattr(planned.memory_gib, name), held / GIB)
    seen = sum(getattr(planned.memory_gib, name) for name in _MEMORY)
    yield _compared("peak", seen, measured.memory.peak_bytes / GIB)


def _explained(step: ComparedPart, rows: list[ComparedPart]) -> list[str]:
    """The largest differences, each with its share of all of them."""
    total = sum(abs(one.difference) for one in rows)
    largest = sorted(rows, key=lambda one: -abs(one.difference))[:_EXPLAINED]
    return [
        f"{one.name}: {one.measured:,.1f} ms, {abs(one.difference):,.1f} "
        f"{'more' if one.difference > 0 else 'less'} than planned, "
        f"{abs(one.difference) / total:.0%} of all differences"
        for one in largest
        if total and abs(one.difference) > 0.001 * step.measured
    ]


def read_plan(path: Path) -> Plan:
    """The plan in a file, or in a folder's plan.json.

    Raises:
        ValueError: one line that names the file, the field and the fix.
    """
    return Plan.read(plan_path(path), "give a plan.json that megatron-mone plan wrote")


def plan_path(path: Path) -> Path:
    """A file as it is; of a folder its plan.json."""
    return path / "plan.json" if path.is_dir() else path
