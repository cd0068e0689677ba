"""Time and meter merging the rank files of a large job, made up from those of a small one.

    python tools/bench_merge.py [out/profile] --ranks 1024 --steps 50 --out /tmp/big

The ranks of the small job (without a folder, eight built-in ones with three runs) are repeated as
further data parallel replicas on hosts of 8 ranks, their times perturbed; one rank is missing, one
is slow, and with --truncated one file is cut short. tools/merge_profile.py then merges them in a
process of its own, whose seconds and peak memory are printed.
"""

import copy
import os
import platform
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

from megatron_mone.common import machine
from megatron_mone.common.child_processes import tied
from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.common.phases import COMMUNICATION, PASSES, PHASES
from megatron_mone.common.places import program_words
from megatron_mone.profiling.merge import rank_files
from megatron_mone.profiling.rank_record import (
    COORDINATES,
    FOLDER,
    LAYOUT,
    RankRecord,
    read_record,
    record_name,
    write_record,
)

RANKS_A_HOST = 8
STRAGGLER = 3
_NOISE = 0.03
_SLOWDOWN = 1.5
_MOE_LAYERS = 24
_TIMELINE_POINTS = 400
_KINDS = ("weights", "gradients", "optimizer", "activations", "temporaries", "communication")


def run(options: Any) -> int:
    """Make the files, merge them, print what it took; the status of the merge.

    Args:
        options: of the command (commands/bench.py).
    """
    if options.ranks <= STRAGGLER + 1 or options.steps < 1:
        raise ValueError(f"--ranks must be above {STRAGGLER + 1} and --steps above 0")
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"--out {options.out} is not empty; name a new folder")
    files = rank_files(options.folder) if options.folder else []
    small = [read_record(path).plain() for path in files] or built_in_records()
    size = make_files(small, options)
    command = [sys.executable, *program_words("merge_profile"), str(options.out)]
    command += ["--skip-unreadable"] if options.truncated else []
    start = time.perf_counter()
    done = subprocess.run(command, preexec_fn=tied())
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * 1024
    print(
        f"\n{options.ranks} ranks, {options.steps} steps, {len(small[0]['runs'])} runs, "
        f"{size / 2**20:.0f} MiB in files: {seconds:.1f} s "
        f"({used.ru_utime + used.ru_stime:.1f} s of a core), peak {peak / 2**20:.0f} MiB\n"
        f"on {machine.cpu_model()}, {machine.cores()} cores, Python {platform.python_version()}, "
        f"numpy {np.__version__}; load {machine.load_average():.1f}"
    )
    return done.returncode


def make_files(small: list[dict[str, Any]], options: Any) -> int:
    """Write the rank files of the large job; returns their bytes."""
    missing, size = options.ranks // 2, 0
    for rank in range(options.ranks):
        if rank == missing:
            continue
        path = write_record(options.out, grown(small, rank, options.ranks, options.steps))
        size += path.stat().st_size
    if options.truncated:
        path = options.out / FOLDER / record_name(options.ranks - 1)
        os.truncate(path, path.stat().st_size // 2)
    return size


def grown(small: list[dict[str, Any]], rank: int, ranks: int, steps: int) -> dict[str, Any]:
    """The record of one rank of a job of `ranks`, as a further replica of one in `small`."""
    replica, place = divmod(rank, len(small))
    record = copy.deepcopy(small[place])
    record |= {"rank": rank, "world_size": ranks, "host": f"node{rank // RANKS_A_HOST:04d}"}
    layout = record["config"]["layout"]
    for axis in ("dp", "edp"):
        record["coordinates"][axis] += replica * layout[axis]
        layout[axis] *= -(-ranks // len(small))
    generator = np.random.default_rng(rank)
    for run in record["runs"]:
        perturb(run, steps, generator, slow=rank == STRAGGLER)
    return record


def perturb(run: dict[str, Any], steps: int, generator: np.random.Generator, slow: bool) -> None:
    """Bring a run to `steps` steps, with noise on its times; the phases add up to its steps."""
    total = np.zeros(steps)
    for phase, passes in run["phases"].items():
        factor = _SLOWDOWN if slow and phase not in COMMUNICATION else 1.0
        for name, times in passes.items():
            noisy = np.abs(
                np.resize(times, steps) * (1 + _NOISE * generator.standard_normal(steps))
            )
            passes[name] = (factor * noisy).tolist()
            total += factor * noisy
    for traffic in run["communication"].values():
        for name, values in traffic.items():
            traffic[name] = np.resize(values, steps).tolist()
    run["rows"] = np.resize(run["rows"], steps).tolist()
    run["step_ms"] = total.tolist()
    run["steps"] = list(range(3, 3 + steps))
    run["windows"] = [step // 5 for step in range(steps)]


def built_in_records() -> list[dict[str, Any]]:
    """Records of a job with expert parallel size 8, whose times are made up."""
    generator = np.random.default_rng(0)
    runs = [_built_in_run(name, generator) for name in ("mone", "moe", "grouped_mm")]
    records = []
    for rank in range(8):
        runs = copy.deepcopy(runs)
        for run in runs:
            for layer in run["routing"]["layers"]:
                layer["first_expert"] = 8 * rank
        record = {
            "schema": RankRecord.SCHEMA,
            "job": "made-up",
            "rank": rank,
            "world_size": 8,
            "host": "node0000",
            "device": "made up",
            "coordinates": dict.fromkeys(COORDINATES, 0) | {"ep": rank, "dp": rank},
            "config": {
                "layout": dict.fromkeys(LAYOUT, 1) | {"dp": 8, "ep": 8},
                "routing": "real",
                "micro_batches": 2,
                "tokens_per_step": 4096,
                "argv": [],
                "machine": {},
            },
            "complete": True,
            "runs": runs,
        }
        records.append(record)
    return records


def _built_in_run(name: str, generator: np.random.Generator) -> dict[str, Any]:
    """One step of every phase in every pass, 24 MoE layers of 8 local experts, a full timeline."""
    layers = range(1, 1 + _MOE_LAYERS)
    bins = len(LOAD_EDGES) + 1
    mone = name == "mone"
    neurons = {"rows": 8192, "kept": 2883584, "width": 1408, "dead": 0, "max_over_mean": 3.1}
    return {
        "name": name,
        "backend": "made up",
        "model": {"num_layers": _MOE_LAYERS, "mone_neuron_ratio": 0.25 if mone else None},
        "steps": [3],
        "windows": [0],
        "step_ms": [1.0],
        "phases": {
            phase: {part: generator.uniform(1, 20, 1).tolist() for part in PASSES}
            for phase in PHASES
        },
        "communication": {
            f"{operation} {group}": {"calls": [8], "bytes": [1048576], "ms": [3.1]}
            for operation in ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
            for group in ("ep", "dp", "edp")
        },
        "rows": [8192],
        "routing": {
            "layers": [
                {"layer": layer, "first_expert": 0, "rows": generator.integers(1, 900, 8).tolist()}
                for layer in layers
            ]
        },
        "neurons": {
            "layers": [{"layer": layer, **neurons, "histogram": [268] * bins} for layer in layers]
        }
        if mone
        else None,
        "flops": {
            "modules": {phase: {"executed": 1.2e9, "active": 1.2e9} for phase in PHASES},
            "bytes": {"up/down GEMM": 3.1e8},
            "peak_flops": 1.6e11,
            "peak_bytes_per_s": 2.0e10,
        },
        "memory": _built_in_memory(generator),
    }


def _built_in_memory(generator: np.random.Generator) -> dict[str, Any]:
    points = _TIMELINE_POINTS
    held = {kind: generator.integers(0, 2**33, points).tolist() for kind in _KINDS}
    return {
        "peak_bytes": 6 * 2**33,
        "peak_phase": "loss",
        "peak_pass": "backward",
        "peak_ms": 130.2,
        "by_kind": dict.fromkeys(_KINDS, 2**33),
        "by_phase": {phase: dict.fromkeys(_KINDS, 2**32) for phase in PHASES},
        "timeline": {
            "ms": np.linspace(0, 300, points).tolist(),
            "phase": [list(PHASES)[point % len(PHASES)] for point in range(points)],
            **held,
        },
        "measured": {"allocator_peak_bytes": None, "process_peak_bytes": 2**33},
    }
