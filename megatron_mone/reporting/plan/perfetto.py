"""The predicted step as a trace that ui.perfetto.dev and chrome://tracing open.

One process a model, one track a pipeline stage. A pass is named after its micro-batch and chunk,
F12.1 or B12.1; where a stage waits there is a gap. Times in a trace are microseconds from the
step's start. Writes the file it is told to, and touches nothing else.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mone.common.files import atomic_write
from megatron_mone.planning.plan_document import Plan, PlannedModel, Timeline

FORWARD, BACKWARD = "forward", "backward"
GATHER, REDUCE, OPTIMIZER = "parameter gather", "gradient reduce", "optimizer"


@dataclass(frozen=True)
class Slice:
    """What one stage does for a while.

    Attributes:
        start, end: ms from the step's start.
        category: FORWARD, BACKWARD, GATHER, REDUCE or OPTIMIZER.
        micro_batch, chunk: of a pass; None of the others.
    """

    start: float
    end: float
    category: str
    micro_batch: int | None = None
    chunk: int | None = None

    @property
    def name(self) -> str:
        """F12.1 for micro-batch 12 in chunk 1; of what is no pass the category."""
        if self.micro_batch is None:
            return self.category
        return f"{self.category[0].upper()}{self.micro_batch}.{self.chunk}"


def step_slices(timeline: Timeline) -> list[list[Slice]]:
    """[P] what each stage does in the step, in order of time; slices of no length are left out.

    Parameters are gathered before the first pass; a stage's gradients are reduced after its last
    one, as far as that is not hidden; the update waits for the slowest stage's, since all ranks
    agree on the gradient's norm.

    Args:
        timeline: of a model in plan.json.
    """
    origin = min(passes[0][0] for passes in timeline.stages) - timeline.gather_ms
    rows = []
    for passes, reduce_ms in zip(timeline.stages, timeline.reduce_ms, strict=True):
        row = [Slice(0.0, timeline.gather_ms, GATHER)]
        for start, end, kind, micro_batch, chunk in passes:
            category = FORWARD if kind == "F" else BACKWARD
            row.append(Slice(start - origin, end - origin, category, micro_batch, chunk))
        row.append(Slice(row[-1].end, row[-1].end + reduce_ms, REDUCE))
        rows.append(row)
    update = max(row[-1].end for row in rows)
    for row in rows:
        row.append(Slice(update, update + timeline.optimizer_ms, OPTIMIZER))
    return [[one for one in row if one.end > one.start] for row in rows]


def timeline_events(models: Iterable[PlannedModel]) -> dict[str, Any]:
    """The trace of the models' steps, in Chrome's JSON format.

    Args:
        models: of a checked plan.
    """
    events = [event for i, model in enumerate(models, 1) for event in _events(model, i)]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def write_perfetto(path: Path, plan: Plan) -> None:
    """Write the steps of all models compared as one gzipped trace, whole or not at all.

    Args:
        path: ends in .json.gz, by which the viewers know it.
        plan: checked.
    """
    text = json.dumps(timeline_events(plan.models), separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, gzip.compress(text.encode(), mtime=0))


def _events(model: PlannedModel, process: int) -> Iterator[dict[str, Any]]:
    name = f"{model.name}, predicted"
    yield _label("process_name", process, 0, name=name)
    yield _label("process_sort_index", process, 0, sort_index=process)
    for stage, row in zip(model.stages, step_slices(model.timeline), strict=True):
        track = stage.stage + 1  # 0 would be the process's own
        yield _label("thread_name", process, track,
                     name=f"stage {stage.stage}: {stage.layers}")  # fmt: skip
        yield _label("thread_sort_index", process, track, sort_index=track)
        for one in row:
            yield _slice(one, process, track)


def _label(kind: str, process: int, track: int, **values: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": values}


def _slice(one: Slice, process: int, track: int) -> dict[str, Any]:
    event: dict[str, Any] = {
        "ph": "X", "name": one.name, "cat": one.category, "pid": process, "tid": track,
        "ts": 1e3 * one.start, "dur": 1e3 * (one.end - one.start),
    }  # fmt: skip
    if one.micro_batch is not None:
        event["args"] = {"micro_batch": one.micro_batch, "chunk": one.chunk}
    return event
