"""Valid rank records with chosen numbers, for tests of what reads them."""

import copy
from pathlib import Path
from typing import Any

from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.profiling.merge import combine, merge
from megatron_mone.profiling.rank_record import RankRecord, record_name, write_record

MIB = 2**20


def make_phases(
    steps: int, ms: dict[str, float], backward: float = 0.0
) -> dict[str, dict[str, list[float]]]:
    """`ms` forward and `backward` times as much backward, alike in every step."""
    return {
        phase: {"forward": [value] * steps}
        | ({"backward": [backward * value] * steps} if backward else {})
        for phase, value in ms.items()
    }


def make_run(
    name: str = "mone",
    *,
    steps: int = 4,
    ms: dict[str, float] | None = None,
    rows: float = 100.0,
    expert_rows: tuple[int, ...] = (200, 200),
    first_expert: int = 0,
    peak_bytes: int | None = 64 * MIB,
    **changes: Any,
) -> dict[str, Any]:
    """One run: one MoE layer, equal steps that add up, two steps a window.

    Args:
        ms: phase -> forward ms of every step.
        rows: routed rows of a step.
        expert_rows: of each local expert over all steps.
        changes: replace fields.
    """
    ms = ms or {"attention": 4.0, "dispatch": 1.0, "up/down GEMM": 4.0, "other": 1.0}
    histogram = [0] * (len(LOAD_EDGES) + 1)
    histogram[20] = 32
    run = {
        "name": name,
        "backend": "cpu",
        "model": {"num_layers": 1, "hidden_size": 16, "mone_neuron_ratio": 0.25},
        "steps": list(range(3, 3 + steps)),
        "windows": [step // 2 for step in range(steps)],
        "step_ms": [sum(ms.values())] * steps,
        "phases": make_phases(steps, ms),
        "communication": {
            "all_to_all ep": {"calls": [2] * steps, "bytes": [1024] * steps, "ms": [0.5] * steps}
        },
        "collectives": [
            {
                "operation": "all_to_all",
                "group": "ep",
                "bytes": 1024,
                "phase": "permute",
                "calls": [2] * steps,
                "ms": [0.5] * steps,
            }
        ],
        "rows": [rows] * steps,
        "routing": {
            "layers": [{"layer": 1, "first_expert": first_expert, "rows": list(expert_rows)}]
        },
        "neurons": {
            "layers": [
                {
                    "layer": 1,
                    "rows": sum(expert_rows),
                    "kept": 4 * sum(expert_rows),
                    "width": 16,
                    "dead": 0,
                    "max_over_mean": 1.5,
                    "histogram": histogram,
                }
            ]
        },
        "flops": {
            "modules": {"attention": {"executed": 2e9, "active": 1e9}},
            "bytes": {"up/down GEMM": 1e6},
            "peak_flops": 1e12,
            "peak_bytes_per_s": None,
        },
        "memory": None if peak_bytes is None else make_memory(peak_bytes),
    }
    return run | changes


def make_memory(peak_bytes: int) -> dict[str, Any]:
    """A memory pass with its peak in the loss."""
    return {
        "peak_bytes": peak_bytes,
        "peak_phase": "loss",
        "peak_pass": "backward",
        "peak_ms": 5.0,
        "by_kind": {"weights": peak_bytes // 2, "activations": peak_bytes - peak_bytes // 2},
        "by_phase": {"attention": {"activations": 1024}},
        "timeline": {"ms": [0.0, 5.0], "phase": ["data", "loss"], "weights": [1, 2]},
        "measured": {"allocator_peak_bytes": None, "process_peak_bytes": 2 * peak_bytes},
    }


def make_record(
    rank: int = 0, world_size: int = 2, *, runs: list[dict[str, Any]] | None = None, **changes: Any
) -> dict[str, Any]:
    """One rank of an expert parallel job, two ranks a host; `changes` replace fields."""
    ranks = ("dp", "ep")
    record = {
        "schema": "megatron-mone/rank-profile/1",
        "job": "3f1c",
        "rank": rank,
        "world_size": world_size,
        "host": f"node{rank // 2:02d}",
        "device": "a device",
        "coordinates": {
            name: rank if name in ranks else 0
            for name in ("tp", "cp", "dp", "pp", "ep", "etp", "edp")
        },
        "config": {
            "layout": {
                name: world_size if name in ranks else 1
                for name in ("tp", "cp", "dp", "pp", "vpp", "ep", "etp", "edp")
            },
            "routing": "real",
            "micro_batches": 2,
            "tokens_per_step": 128,
            "argv": ["--steps", "4"],
            "machine": {"Processor": "a processor"},
        },
        "complete": True,
        "runs": runs if runs is not None else [make_run(first_expert=2 * rank)],
    }
    return copy.deepcopy(record | changes)


def combined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The profile of records that are in no files."""
    checked = (RankRecord.of(record, Path("a record")) for record in records)
    return combine((Path(record_name(record.rank)), record) for record in checked).plain()


def make_profile(folder: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the records and merge them; `folder` then holds profile.json."""
    for record in records:
        write_record(folder, record)
    return merge(folder).plain()
