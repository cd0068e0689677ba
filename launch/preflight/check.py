"""The check of one task: what is wrong here, as one JSON line, in bounded time. No torch here.

The line goes through srun and not through a file, so that a node without its file systems speaks
too. Nothing in it is trusted by `judge`.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launch.preflight.bounded import CallFailed, bounded, one_line
from launch.preflight.gpu import ask_gpus, gpu_faults, gpu_versions
from launch.preflight.limits import Limits
from launch.preflight.lines import printable
from launch.preflight.node import (
    memory_faults,
    run_folder_faults,
    software_versions,
    temporary_folder_faults,
)
from launch.preflight.pairs import pair_rounds
from launch.preflight.place import Place, find_host, place_of, read_hosts

LINE_BYTES = 1000
"""srun hands lines on in pieces of 1,024 bytes, between which another task's may come."""
_CALL_SECONDS = 30.0
_GPU_SECONDS = 70.0
_BEYOND_STAGES = 15.0


def check(hosts_file: Path, limits: Limits) -> str:
    """All checks of this rank; one line of JSON, whatever happens."""
    start = time.monotonic()
    faults: list[str] = []
    line: dict[str, Any] = {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "time": int(time.time()),
        "faults": faults,
    }
    try:
        place = place_of(os.environ)
        line |= {
            "host": place.host,
            "rank": place.rank,
            "local_rank": place.local_rank,
            "ranks_per_node": place.ranks_per_node,
        }
        _look(line, place, hosts_file, limits, start)
    except Exception as error:  # a check that fails is a node that is not fit
        faults.append(f"the check failed: {one_line(error)}")
    for fault in faults:
        print(f"preflight: {line['host']}: {printable(fault)}", file=sys.stderr, flush=True)
    return fitting(line)


def fitting(line: dict[str, Any]) -> str:
    """The line as JSON, below LINE_BYTES; where it is too long, texts are cut."""
    for length in (200, 120, 80, 50, 30, 15):
        short = line | {"faults": [text[:length] for text in line["faults"][:8]]}
        for name in ("pairs", "versions"):
            if name in line:
                short[name] = {key[:40]: _cut(value, length) for key, value in line[name].items()}
        text = json.dumps(short, separators=(",", ":"))
        if len(text) < LINE_BYTES:
            return text
    rest = {name: value for name, value in line.items() if name not in ("pairs", "versions")}
    return json.dumps(rest | {"faults": [text[:15] for text in line["faults"][:2]]})


def _cut(value: Any, length: int) -> Any:
    return value[:length] if isinstance(value, str) else value


def _look(
    line: dict[str, Any], place: Place, hosts_file: Path, limits: Limits, start: float
) -> None:
    """Add to the line what is found, each check on its own."""
    faults: list[str] = line["faults"]
    if place.gpus is not None:
        _ask("GPUs", faults, partial(_look_at_gpus, place, limits), _GPU_SECONDS, line)
    if place.local_rank == 0:
        _look_at_node(line, place, hosts_file, limits)
    backend = limits.backend or ("nccl" if place.gpus is not None else "gloo")
    if backend == "gloo" and place.local_rank:
        return
    hosts = _ask("the host list", faults, lambda: read_hosts(hosts_file), _CALL_SECONDS)
    if hosts is None:
        return
    hosts = tuple(hosts)
    node = find_host(place, hosts)
    stages = len(pair_rounds(len(hosts))) + (backend == "nccl" and place.ranks_per_node > 1)
    if not stages:
        return
    found = _ask(
        "all-reduce", faults, lambda: _measure(place, hosts, node, limits, backend, start),
        limits.seconds * (1 + stages / 2) + _BEYOND_STAGES,
    )  # fmt: skip
    _take_measured(line, found or {}, place)


def _take_measured(line: dict[str, Any], found: dict[str, Any], place: Place) -> None:
    line["faults"] += [f"all-reduce: {fault}" for fault in found.get("faults", ())]
    line.setdefault("versions", {}).update(found.get("versions", {}))
    within = found.get("node")
    if isinstance(within, str):
        line["faults"].append(f"all-reduce within the node: {within}")
    if place.local_rank:  # one line a node tells the rest
        line.pop("versions")
        return
    if isinstance(within, float):
        line["node_gb_per_s"] = round(within, 3)
    line["pairs"] = {
        partner: round(value, 3) if isinstance(value, float) else value
        for partner, value in found.get("pairs", {}).items()
    }


def _look_at_gpus(place: Place, limits: Limits) -> dict[str, Any]:
    facts = ask_gpus(place, limits)
    versions = {} if place.local_rank else gpu_versions(facts)
    return {"faults": gpu_faults(facts, place, limits), "versions": versions}


def _look_at_node(line: dict[str, Any], place: Place, hosts_file: Path, limits: Limits) -> None:
    folder, token = hosts_file.parent, f"{place.rank}-{os.getpid()}"
    calls: dict[str, Callable[[], Any]] = {
        "the run folder": lambda: {"faults": run_folder_faults(folder, token, limits)},
        "the temporary folder": lambda: {"faults": temporary_folder_faults(limits)},
        "main memory": lambda: {"faults": memory_faults(_meminfo(), limits)},
        "versions": lambda: {"faults": [], "versions": software_versions()},
    }
    for what, call in calls.items():
        _ask(what, line["faults"], call, _CALL_SECONDS, line)


def _ask(
    what: str, faults: list[str], call: Callable[[], Any], seconds: float,
    line: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """What a bounded call returns, None after a fault; its findings go into the line, if given."""
    try:
        found = bounded(call, seconds)
    except CallFailed as error:
        faults.append(f"{what}: {error}")
        return None
    if line is not None:
        faults += found["faults"]
        if found.get("versions"):
            line.setdefault("versions", {}).update(found["versions"])
    return found


def _meminfo() -> str:
    return Path("/proc/meminfo").read_text()


def _measure(*arguments: Any) -> Any:
    from launch.preflight.bandwidth import measure  # torch, in the child that measures only

    return measure(*arguments)
