"""What one rank measured, as a file: its schema, written whole, read with every field checked.

docs/PROFILER.md describes the fields. Touches the folder it is given; imports no torch, so that
ranks can be merged where none is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_mone.common import checked_json
from megatron_mone.common.checked_json import Field
from megatron_mone.common.files import atomic_write
from megatron_mone.common.phases import PASSES, PHASES

SCHEMA = "megatron-mone/rank-profile/1"
FOLDER = "ranks"
COORDINATES = ("tp", "cp", "dp", "pp", "ep", "etp", "edp")
LAYOUT = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp", "edp")
LOAD_EDGES = tuple(round(2.0 ** (k / 4), 6) for k in range(-20, 21))
"""moe/neuron_load.HISTOGRAM_EDGES, which importing would bring torch along."""
MOST_RANKS = 1_000_000
MOST_EXPERTS = 1_000_000
_FIX = "profile again with this version, or delete the file to merge the other ranks"


def record_name(rank: int) -> str:
    """`rank-00003.json`."""
    return f"rank-{rank:05d}.json"


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Check a record and write it as `folder/ranks/rank-NNNNN.json`, whole or not at all.

    Raises:
        ValueError: one line that names the field that the schema does not allow.
    """
    path = folder / FOLDER / record_name(record["rank"])
    check_record(record, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    atomic_write(path, text.encode() + b"\n")
    return path


def clear_records(folder: Path) -> None:
    """Remove the rank files of an earlier job, which would not merge with those of a new one."""
    for path in (folder / FOLDER).glob("rank-*.json"):
        path.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file, all its fields checked.

    Raises:
        checked_json.UnreadableFile: the file holds no JSON.
        ValueError: its content is not that of a rank record; one line either way.
    """
    record = checked_json.load(path, "delete it, or merge with --skip-unreadable")
    check_record(record, path)
    if path.name != record_name(record["rank"]):
        raise ValueError(
            f"{path}: holds rank {record['rank']}, whose file is {record_name(record['rank'])}; "
            "rename it, or delete it if it is a copy"
        )
    return record


def check_record(record: Any, path: Path) -> None:
    """Raise a ValueError, in the name of `path`, unless `record` is what the schema says."""
    root = Field(record, path, _FIX)
    checked_json.check_schema(root, SCHEMA)
    for name in ("job", "host", "device"):
        root[name].text()
    world_size = root["world_size"].whole(MOST_RANKS)
    rank = root["rank"].whole()
    if rank >= world_size:
        root["rank"].fail(f"{rank} is outside world_size {world_size}")
    for name in COORDINATES:
        root["coordinates"][name].whole(MOST_RANKS)
    complete = root["complete"].flag()
    _check_config(root["config"])
    names = set()
    for run in root["runs"].elements():
        name = run["name"].text()
        if name in names:
            run["name"].fail(f"{name!r} is the name of two runs")
        names.add(name)
        _check_run(run, complete)
    if not names and complete:
        root["runs"].fail("is empty in a complete record")


def _check_config(config: Field) -> None:
    for name in LAYOUT:
        config["layout"][name].whole(MOST_RANKS)
    config["routing"].text()
    config["micro_batches"].whole()
    config["tokens_per_step"].whole()
    list(config["argv"].elements())
    list(config["machine"].members())


def _check_run(run: Field, complete: bool) -> None:
    run["backend"].text()
    list(run["model"].members())
    steps = run["steps"].numbers()
    if not len(steps) and complete:
        run["steps"].fail("is empty in a complete record")
    if len(steps) and (steps.dtype.kind != "i" or (steps[1:] <= steps[:-1]).any()):
        run["steps"].fail("must be iteration numbers, each above the one before")
    for name in ("windows", "rows"):
        run[name].numbers(len(steps))
    if not (run["step_ms"].numbers(len(steps)) > 0).all():
        run["step_ms"].fail("has a step of 0 ms")
    for phase, passes in run["phases"].members():
        if phase not in PHASES:
            run["phases"].fail(f"{phase!r} is no phase of this version")
        for name, times in passes.members():
            if name not in PASSES:
                passes.fail(f"{name!r} is none of {', '.join(PASSES)}")
            times.numbers(len(steps))
    for _, traffic in run["communication"].members():
        for name in ("calls", "bytes", "ms"):
            traffic[name].numbers(len(steps))
    _check_loads(run)
    _check_flops(run["flops"])
    if run["memory"].value is not None:
        _check_memory(run["memory"])


def _check_loads(run: Field) -> None:
    for layer in run["routing"]["layers"].elements():
        layer["layer"].whole()
        layer["first_expert"].whole(MOST_EXPERTS)
        if not 1 <= len(layer["rows"].numbers()) <= MOST_EXPERTS:
            layer["rows"].fail(f"must have the rows of 1 to {MOST_EXPERTS} experts")
    if run["neurons"].value is None:
        return
    for layer in run["neurons"]["layers"].elements():
        for name in ("layer", "rows", "kept", "width", "dead"):
            layer[name].whole()
        layer["max_over_mean"].number()
        layer["histogram"].numbers(len(LOAD_EDGES) + 1)


def _check_flops(flops: Field) -> None:
    for phase, counts in flops["modules"].members():
        if phase not in PHASES:
            flops["modules"].fail(f"{phase!r} is no phase of this version")
        counts["executed"].number()
        counts["active"].number()
    for _, least in flops["bytes"].members():
        least.number()
    for name in ("peak_flops", "peak_bytes_per_s"):
        if flops[name].value is not None:
            flops[name].number()


def _check_memory(memory: Field) -> None:
    memory["peak_bytes"].whole()
    memory["peak_phase"].text(tuple(PHASES))
    memory["peak_pass"].text(PASSES)
    memory["peak_ms"].number()
    for _, held in memory["by_kind"].members():
        held.whole()
    for _, kinds in memory["by_phase"].members():
        for _, held in kinds.members():
            held.whole()
    timeline = memory["timeline"]
    points = len(timeline["ms"].numbers())
    for name, values in timeline.members():
        if name == "phase":
            values.texts(points, tuple(PHASES))
        else:
            values.numbers(points)
    for name in ("allocator_peak_bytes", "process_peak_bytes"):
        if memory["measured"][name].value is not None:
            memory["measured"][name].whole()
