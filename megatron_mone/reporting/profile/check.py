"""Refuses a profile.json that the report cannot be drawn from, in one line with file and field.

Reads the files it is given; nothing in them is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_mone.common import checked_json
from megatron_mone.common.checked_json import Field, differences
from megatron_mone.common.phases import PASSES, PHASES
from megatron_mone.profiling.merge import PROFILE, SCHEMA
from megatron_mone.profiling.rank_record import LOAD_EDGES, MOST_RANKS

_FIX = "merge its rank files again with tools/merge_profile.py"
_MOST_LAYERS = 100_000


def read_profile(folder: Path) -> dict[str, Any]:
    """The checked content of FOLDER/profile.json.

    Raises:
        ValueError: the file is missing, is not JSON, or is not a profile; one line that names it.
    """
    path = folder / PROFILE
    profile = checked_json.load(path, "name a folder that tools/profile.py wrote")
    check_profile(profile, path)
    return profile


def check_profile(profile: Any, path: Path = Path(PROFILE)) -> None:
    """Raise a ValueError, in the name of `path`, at the first field that cannot be drawn."""
    root = Field(profile, path, _FIX)
    checked_json.check_schema(root, SCHEMA)
    _check_config(root["config"])
    ranks = root["ranks"]
    world = ranks["world_size"].whole(MOST_RANKS)
    if not ranks["present"].whole(world):
        ranks["present"].fail("is 0: there is nothing to draw")
    for name in ("missing", "incomplete"):
        _ranks(ranks[name], world)
    for _, members in ranks["hosts"].members():
        _ranks(members, world)
    names: list[str] = []
    for run in root["runs"].elements():
        names.append(run["name"].text())
        if names.count(names[-1]) > 1:
            run["name"].fail(f"{names[-1]!r} is the name of two runs")
        _check_run(run, world)
    if not names:
        root["runs"].fail("is empty: there is nothing to draw")


def check_one_model(profiles: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Raise a ValueError unless `profiles` can be points of one scaling curve.

    Args:
        profiles: checked.
        names: of the profiles, for the message.
    """
    first = {run["name"]: run["model"] for run in profiles[0]["runs"]}
    sizes: dict[int, str] = {}
    for profile, name in zip(profiles, names, strict=True):
        world = profile["ranks"]["world_size"]
        if world in sizes:
            raise ValueError(
                f"ranks.world_size is {world} in both {sizes[world]} and {name}; a scaling curve "
                "needs another number of ranks in each: leave one out"
            )
        sizes[world] = name
        common = [run for run in profile["runs"] if run["name"] in first]
        if not common:
            raise ValueError(
                f"{name} has no run of {names[0]}'s ({', '.join(first)}): a scaling curve needs a "
                "common run, leave it out"
            )
        for run in common:
            for field, ours, theirs in differences(first[run["name"]], run["model"]):
                raise ValueError(
                    f"run {run['name']!r}: model.{field} is {ours!r} in {names[0]} and {theirs!r} "
                    f"in {name}; a scaling curve needs one model: leave one out"
                )


def _check_config(config: Field) -> None:
    for _, size in config["layout"].members():
        size.whole(MOST_RANKS)
    config["routing"].text()
    config["micro_batches"].whole()
    _positive(config["tokens_per_step"])
    for word in config["argv"].elements():
        if not isinstance(word.value, str):
            word.fail("must be a text")
    list(config["machine"].members())


def _check_run(run: Field, world: int) -> None:
    run["backend"].text()
    list(run["model"].members())
    _positive(run["step_ms"])
    _by_phase(run["phases"], Field.number)
    _by_phase(run["passes"], lambda split: _by_name(split, PASSES, Field.number))
    samples = run["samples"]
    steps = len(samples["steps"].numbers())
    if not steps:
        samples["steps"].fail("is empty")
    for name in ("windows", "step_ms"):
        samples[name].numbers(steps)
    _by_phase(samples["phases"], lambda values: values.numbers(steps))
    for spread in ("over_ranks", "over_nodes"):
        for _, values in run[spread].members():
            for name in ("min", "median", "max"):
                values[name].number()
    _check_by_rank(run["by_rank"], world)
    for entry in run["stragglers"].elements():
        entry["host"].text()
        entry["phase"].text(tuple(PHASES))
        entry["rank"].whole(world - 1)
        for name in ("stage", "compute_ms", "median_ms", "rows_over_mean"):
            entry[name].number()
    for group in run["expert_groups"].elements():
        _ranks(group["ranks"], world)
        group["rows_max_over_mean"].number()
        group["expert_ms_max_over_mean"].number()
    for _, traffic in run["communication"].members():
        for name in ("calls", "bytes", "ms"):
            traffic[name].number()
    _check_load(run)
    _check_flops(run["flops"])
    if run["memory"].value is not None:
        _check_memory(run["memory"], world)


def _check_by_rank(by_rank: Field, world: int) -> None:
    ranks = _ranks(by_rank["rank"], world)
    if not ranks:
        by_rank["rank"].fail("is empty")
    by_rank["stage"].numbers(ranks)
    _by_phase(by_rank["phases"], lambda values: values.numbers(ranks))


def _check_load(run: Field) -> None:
    routing = run["routing"]
    routing["rows_max_over_mean"].number()
    for layer in routing["layers"].elements():
        layer["layer"].whole(_MOST_LAYERS)
        layer["max_over_mean"].number()
        for rows in layer["rows"].elements():
            if rows.value is not None:  # an expert whose ranks are all missing
                rows.number()
    neurons = run["neurons"]
    if neurons.value is None:
        return
    for name in ("kept_ratio", "load_p1", "load_p50", "load_p99", "max_over_mean"):
        neurons[name].number()
    neurons["dead"].whole()
    for layer in neurons["layers"].elements():
        layer["histogram"].numbers(len(LOAD_EDGES) + 1)


def _check_flops(flops: Field) -> None:
    for name in ("executed", "active", "executed_per_s", "active_per_s"):
        flops[name].number()
    for _, counts in flops["modules"].members():
        counts["executed"].number()
        counts["active"].number()
    for _, least in flops["bytes"].members():
        least.number()
    known = flops["utilisation_executed"].value is not None
    for name in ("utilisation_executed", "utilisation_active"):
        if known:
            flops[name].number()
    for name in ("peak_flops", "peak_bytes_per_s"):
        if name in flops and flops[name].value is not None:
            flops[name].number()


def _check_memory(memory: Field, world: int) -> None:
    _positive(memory["peak_bytes"])
    memory["peak_phase"].text(tuple(PHASES))
    memory["peak_pass"].text(PASSES)
    memory["peak_ms"].number()
    memory["peak_rank"].whole(world - 1)
    for _, held in memory["by_kind"].members():
        held.number()
    _by_phase(
        memory["by_phase"], lambda kinds: [held.number() for _, held in kinds.members()]
    )  # fmt: skip
    timeline = memory["timeline"]
    points = len(timeline["ms"].numbers())
    for name, values in timeline.members():
        if name != "phase":
            values.numbers(points)
    for _, measured in memory["measured"].members():
        if measured.value is not None:
            measured.number()


def _by_phase(field: Field, check: Callable[[Field], Any]) -> None:
    _by_name(field, tuple(PHASES), check)


def _by_name(field: Field, names: tuple[str, ...], check: Callable[[Field], Any]) -> None:
    for name, value in field.members():
        if name not in names:
            field.fail(f"{name!r} is none of {', '.join(names)}")
        check(value)


def _ranks(field: Field, world: int) -> int:
    """Checks a list of ranks and says how many they are."""
    ranks = field.numbers()
    if len(ranks) and (ranks.dtype.kind != "i" or ranks.max() >= world):
        field.fail(f"must be ranks below world_size {world}")
    return len(ranks)


def _positive(field: Field) -> None:
    if field.number() == 0:
        field.fail("is 0, it must be above 0")
