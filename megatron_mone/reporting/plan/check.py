"""Refuses a plan.json or search that cannot be drawn, in one line with file, field and fix.

Reads the files it is given; nothing in them is executed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_mone.common import checked_json
from megatron_mone.common.checked_json import Field
from megatron_mone.common.phases import PHASES
from megatron_mone.planning.cost.rank_memory import ORDER

PLAN_SCHEMA = "megatron-mone/plan/1"
SEARCH_SCHEMA = "megatron-mone/plan-search/1"
ROUTINGS = ("balanced", "zipf", "replayed")
SIZES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "edp", "micro_batch_size",
         "global_batch_size", "micro_batches")  # fmt: skip
"""The whole numbers of a layout; beside them stands the text `recompute`."""

_FIX = "plan again with tools/plan_scale.py"
_SLACK = 0.01  # of a sum that must agree with its parts, which may be written rounded
_HAIR = 1e-6  # ms
_RATES = ("tokens_per_s_per_gpu", "tflops_per_gpu", "executed_tflops_per_gpu", "mfu")
_SWEPT = ("r", "step_ms", "tokens_per_s_per_gpu", "peak_gib", "expert_ms", "active_flops")


def read_plan(path: Path) -> dict[str, Any]:
    """The checked content of a plan.json.

    Raises:
        ValueError: the file is missing, is not JSON, or is not a plan; one line that names it.
    """
    plan = _load(path)
    check_plan(plan, path)
    return plan


def read_search(path: Path) -> dict[str, Any]:
    """The checked content of a search's file.

    Raises:
        ValueError: the file is missing, is not JSON, or is not a search; one line that names it.
    """
    search = _load(path)
    check_search(search, path)
    return search


def read_either(path: Path) -> dict[str, Any]:
    """The checked content of a plan or of a search, whichever its `schema` says that it is.

    Raises:
        ValueError: neither; one line that names the file.
    """
    found = _load(path)
    is_search = isinstance(found, dict) and found.get("schema") == SEARCH_SCHEMA
    (check_search if is_search else check_plan)(found, path)
    return found


def check_plan(plan: Any, path: Path = Path("plan.json")) -> None:
    """Raise a ValueError, in the name of `path`, at the first field that cannot be drawn."""
    root = Field(plan, path, _FIX)
    checked_json.check_schema(root, PLAN_SCHEMA)
    _check_head(root)
    names: list[str] = []
    for model in root["models"].elements():
        names.append(model["name"].text())
        if names.count(names[-1]) > 1:
            model["name"].fail(f"{names[-1]!r} is the name of two models")
        _check_model(model)
    if not names:
        root["models"].fail("is empty: there is nothing to draw")
    _check_scaling(root["scaling"], names)
    for entry in root["ratio_sweep"].elements():
        _check_swept(entry)
    for entry in root["expert_sweep"].elements():
        _check_swept(entry)
        entry["topk"].whole()
        _difference(entry["exposed_comm_ms"])


def check_search(search: Any, path: Path = Path("search.json")) -> None:
    """Raise a ValueError, in the name of `path`, at the first field that cannot be drawn."""
    root = Field(search, path, _FIX)
    checked_json.check_schema(root, SEARCH_SCHEMA)
    _check_head(root)
    names = []
    for candidate in root["candidates"].elements():
        names.append(candidate["name"].text())
        _check_layout(candidate["layout"])
        candidate["fits"].flag()
        candidate["pareto"].flag()
        for name in ("step_ms", "tokens_per_s_per_gpu", "peak_gib"):
            _positive(candidate[name])
        _check_sum(candidate, "parts_ms", candidate["parts_ms"].members(), "step_ms")
    for refused in root["refused"].elements():
        refused["layout"].text()
        _words(refused["reason"])
    for hopeless in root["hopeless"].elements():
        hopeless.text()
    for best in root["best"].elements():
        if best["layout"].text() not in names:
            best["layout"].fail(f"{best['layout'].value!r} is the name of no candidate")
        _words(best["why"])
    root["not_tried"].whole()


def _load(path: Path) -> Any:
    return checked_json.load(path, "name a file that tools/plan_scale.py wrote")


def _check_head(root: Field) -> None:
    """What a plan and a search begin with."""
    root["model"].text()
    root["efficiency"].text()
    for name in ("gpus", "tokens_per_step"):
        _at_least_1(root[name])
    cluster = root["cluster"]
    for name in ("name", "device"):
        cluster[name].text()
    for name in ("node_devices", "domain_devices"):
        _at_least_1(cluster[name])
    _positive(cluster["memory_gib"])
    root["routing"]["kind"].text(ROUTINGS)
    root["routing"]["hottest"].number()
    for warning in root["warnings"].elements():
        _words(warning)


def _check_model(model: Field) -> None:
    _check_layout(model["layout"])
    fits = model["fits"].flag()
    if not fits or model["first_unfit"].value is not None:
        model["first_unfit"].text(ORDER)
    fix = model["cheapest_fix"]
    if fix.value is not None:
        fix["change"].text()
        fix["step_ms"].number()
        fix["peak_gib"].number()
    _positive(model["step_ms"])
    for name in (*_RATES, "hidden_comm_ms"):
        model[name].number()
    for name in ("exposed_comm_ms", "bubble_ms"):
        _difference(model[name])
    _check_memory(model["memory_gib"])
    stages = 0
    for stage in model["stages"].elements():
        _check_stage(stage, stages)
        stages += 1
    pp = model["layout"]["pp"].whole()
    if stages != pp:
        model["stages"].fail(f"has {stages} stages where layout.pp is {pp}")
    _check_sum(model, "parts_ms", model["parts_ms"].members(), "step_ms")
    for phase, ms in model["phases_ms"].members():
        if phase not in PHASES:
            model["phases_ms"].fail(f"{phase!r} is none of {', '.join(PHASES)}")
        ms.number()
    for collective in model["collectives"].elements():
        for name in ("kind", "group"):
            collective[name].text()
        for name in ("ranks", "stride", "calls"):
            collective[name].whole()
        for name in ("bytes", "ms"):
            collective[name].number()
        if "exposed" in collective:
            collective["exposed"].flag()
    _check_timeline(model["timeline"], stages)


def _check_layout(layout: Field) -> None:
    for name in SIZES:
        _at_least_1(layout[name])
    layout["recompute"].text()


def _check_stage(stage: Field, index: int) -> None:
    number = stage["stage"]
    if number.whole() != index:
        number.fail(f"is {number.value}, in the order of the pipeline it is {index}")
    stage["layers"].text()
    stage["end_ms"].number()
    _check_memory(stage["memory_gib"])
    for chunk in stage["chunks"].elements():
        chunk["forward_ms"].number()
        chunk["backward_ms"].number()


def _check_memory(memory: Field) -> None:
    for name, _ in memory.members():
        if name not in (*ORDER, "peak"):
            memory.fail(f"{name!r} is none of {', '.join(ORDER)}, peak")
    _positive(memory["peak"])
    _check_sum(memory, "the parts", ((name, memory[name]) for name in ORDER), "peak")


def _check_timeline(timeline: Field, stages: int) -> None:
    timeline["shown"].text()
    timeline["gather_ms"].number()
    timeline["optimizer_ms"].number()
    timeline["reduce_ms"].numbers(stages)
    rows = list(timeline["stages"].elements())
    if len(rows) != stages:
        timeline["stages"].fail(f"has {len(rows)} rows where the model has {stages} stages")
    for row in rows:
        passes = list(row.elements())
        if not passes:
            row.fail("is empty: a stage has passes")
        latest = 0.0
        for one in passes:
            parts = list(one.elements())
            if len(parts) != 5:
                one.fail("must be [start_ms, end_ms, F or B, micro-batch, chunk]")
            start, end, kind, micro_batch, chunk = parts
            if end.number() < start.number():
                end.fail(f"{end.value} is before its start, {start.value}")
            if start.number() < latest:
                start.fail(f"{start.value} is before the end of the pass before, {latest}")
            latest = end.number()
            kind.text(("F", "B"))
            micro_batch.whole()
            chunk.whole()


def _check_scaling(scaling: Field, names: list[str]) -> None:
    seen: set[int] = set()
    for point in scaling.elements():
        _at_least_1(point["gpus"])
        if point["gpus"].value in seen:
            point["gpus"].fail(f"{point['gpus'].value} stands in two points")
        seen.add(point["gpus"].value)
        for name, model in point["models"].members():
            if name not in names:
                point["models"].fail(f"{name!r} is none of the models, {', '.join(names)}")
            model["fits"].flag()
            for number in ("step_ms", "tokens_per_s_per_gpu"):
                _positive(model[number])
            for number in ("tflops_per_gpu", "peak_gib"):
                model[number].number()


def _check_swept(entry: Field) -> None:
    _at_least_1(entry["neurons"])
    for name in _SWEPT:
        _positive(entry[name])


def _check_sum(parent: Field, what: str, parts: Iterable[tuple[str, Field]], total: str) -> None:
    """Refuse parts that a stacked bar would show longer or shorter than its total."""
    together = sum(_difference(value) for _, value in parts)
    whole = parent[total].number()
    if abs(together - whole) > _SLACK * whole:
        parent.fail(f"{what} add up to {together:.6g}, {total} is {whole:.6g}")


def _difference(field: Field) -> float:
    """A time found by subtraction, which rounding may leave a hair below 0."""
    if isinstance(field.value, float) and -_HAIR < field.value < 0:
        return 0.0
    return field.number()


def _words(field: Field) -> None:
    """A text of any length, as the page shortens it: Megatron's own words, for one."""
    if not isinstance(field.value, str) or not field.value.strip():
        field.fail("must be a text")


def _at_least_1(field: Field) -> None:
    if field.whole() == 0:
        field.fail("is 0, it must be 1 or more")


def _positive(field: Field) -> None:
    if field.number() == 0:
        field.fail("is 0, it must be above 0")
