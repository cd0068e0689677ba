"""Steps that are watched rather than timed: where the memory goes, and a trace for Perfetto.

Each watcher slows its step down, so none of these steps is among the timed ones. May touch: the
clock of the rank, torch's profiler, the folder it is given.
"""

import gzip
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.files import atomic_write
from megatron_mone.profiling.clock import HostStamps, PhaseClock
from megatron_mone.profiling.instrument import Instruments
from megatron_mone.profiling.ledger import MemoryLedger, persistent_tensors
from megatron_mone.profiling.process_memory import measure_growth
from megatron_mone.profiling.run_meter import Run

TRACES = "traces"
SNAPSHOTS = "memory"
_ANCHOR = "megatron-mone: step"
_MARK, _MARKS = "megatron-mone: clock", 5


def measure_memory(
    folder: Path,
    run: Run,
    step: Callable[[], Any],
    *,
    before_second: Callable[[], None],
    others: Callable[[], Iterable[Tensor]],
) -> dict[str, Any]:
    """The `memory` object of a rank record, from two steps of a run.

    The first tells what the process took from the system, the second who held which bytes.

    Args:
        folder: of the profile; on CUDA the allocator's snapshot goes to its memory/, for
            pytorch.org/memory_viz (not run on a GPU yet).
        run: in training; its optimizer has its state.
        step: does one optimizer step.
        before_second: called between the two, to make the second allocate as the first did.
        others: tensors of other runs in this process, which are not this run's.
    """
    with measure_growth() as growth:
        step()
    before_second()
    snapshot = None
    if torch.cuda.is_available():
        snapshot = _rank_file(folder / SNAPSHOTS, run, "pickle")
    clock = PhaseClock(HostStamps())
    instruments = Instruments(clock)
    instruments.attach(run.model, run.optimizer)
    try:
        with MemoryLedger(
            lambda: persistent_tensors(run.model, run.optimizer), others=others, snapshot=snapshot
        ) as ledger:
            clock.on_switch = ledger.enter
            clock.begin()
            step()
            clock.abandon()
    finally:
        instruments.detach()
    record = ledger.record()
    if growth.peak_bytes is not None:
        record["measured"]["process_peak_bytes"] = ledger.base_bytes + growth.peak_bytes
    return record


def write_trace(folder: Path, run: Run, step: Callable[[], Any]) -> Path:
    """One step as a trace of torch's profiler, our phases as a track of their own.

    Args:
        folder: of the profile; the file goes to its traces/.
        run: named in the file's name.
        step: does one optimizer step.

    Returns:
        traces/NAME-rank-NNNNN.json.gz, for ui.perfetto.dev or TensorBoard.
    """
    clock = PhaseClock(HostStamps())
    instruments = Instruments(clock)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    instruments.attach(run.model, run.optimizer)
    try:
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            marks = [_mark() for _ in range(_MARKS)]
            with torch.profiler.record_function(_ANCHOR):
                clock.begin()
                step()
                clock.end()
    finally:
        instruments.detach()
    path = _rank_file(folder / TRACES, run, "json.gz")
    beside = path.with_name(f".{path.name}.{os.getpid()}.json")
    try:
        profile.export_chrome_trace(str(beside))
        trace = json.loads(beside.read_text())
    finally:
        beside.unlink(missing_ok=True)
    trace["traceEvents"] += _phase_track(trace["traceEvents"], clock, marks)
    atomic_write(path, gzip.compress(json.dumps(trace).encode(), mtime=0))
    return path


def _rank_file(folder: Path, run: Run, ending: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{run.name}-rank-{torch.distributed.get_rank():05d}.{ending}"


def _mark() -> tuple[int, int]:
    """An event of the trace that does nothing: our clock (ns) before it began, and within it."""
    before = time.perf_counter_ns()
    with torch.profiler.record_function(_MARK):
        return before, time.perf_counter_ns()


def _phase_track(
    events: list[dict[str, Any]], clock: PhaseClock, marks: Sequence[tuple[int, int]]
) -> list[dict]:
    """The clock's phases in the trace's time (microseconds), set by the mark that nothing came
    between: its event began when our clock was read, but for the least of their widths."""
    marked = [e for e in events if e.get("name") == _MARK and "ts" in e]
    ours = [e for e in marked if e.get("cat") != "gpu_user_annotation"]  # the GPU's side of it
    found = sorted(ours, key=lambda e: e["ts"])
    anchor, (_, started) = min(
        zip(found, marks, strict=True), key=lambda pair: pair[1][1] - pair[1][0]
    )
    track = {"pid": anchor["pid"], "tid": "phases"}
    spans = [
        {
            **track,
            "ph": "X",
            "cat": "phase",
            "name": phase,
            "args": {"pass": pass_},
            "ts": anchor["ts"] + (start - started) / 1e3,
            "dur": (end - start) / 1e3,
        }
        for start, end, phase, pass_ in clock.host_spans()
    ]
    return [{**track, "ph": "M", "name": "thread_name", "args": {"name": "phases"}}, *spans]
