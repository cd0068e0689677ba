"""Tracer: traces of every distinct virtual stage of a job, several at a time, and none twice.

    with Tracer() as tracer:
        job = tracer.trace(flags, world_size=1024)

May touch: the processes of its pool (worker_pool.py), a temporary folder, the folder of its cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_mone.common.checked_json import load
from megatron_mone.common.documents import AnyText, Whole, record_of
from megatron_mone.planning.tracing.gpu_job import is_gpu_job, last_value
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.stages import Place, in_job, stage_job
from megatron_mone.planning.tracing.trace import Trace
from megatron_mone.planning.tracing.trace_cache import TraceCache, cache_key
from megatron_mone.planning.tracing.trace_worker import CPU, DESCRIBE, GPU, TRACE
from megatron_mone.planning.tracing.worker_pool import Request, WorkerPool

_FIX = "plan the job again"

Progress = Callable[[int, int], None]
"""Told (traces there are, traces needed)."""


@dataclass(frozen=True)
class DescribedStage:
    """Chunk `chunk` of pipeline stage `stage`.

    Attributes:
        key: equal keys mean equal traces.
        first_layer: number of its first decoder layer, 1-based.
    """

    stage: Whole
    chunk: Whole
    key: AnyText
    first_layer: Whole


@dataclass(frozen=True)
class JobDescription:
    """A job that Megatron accepts, without any of its model.

    Attributes:
        facts: for the cost model.
        stages: in the order in which a micro-batch goes through them.
        stage_flags: of the job in which every virtual stage is a stage of its own.
    """

    facts: JobFacts
    stages: tuple[DescribedStage, ...]
    stage_flags: tuple[AnyText, ...]

    @cached_property
    def keys(self) -> dict[Place, str]:
        """(p, v) -> key."""
        return {(one.stage, one.chunk): one.key for one in self.stages}

    @cached_property
    def first_layers(self) -> dict[Place, int]:
        """(p, v) -> first layer."""
        return {(one.stage, one.chunk): one.first_layer for one in self.stages}

    @classmethod
    def read(cls, path: Path) -> JobDescription:
        """Read what trace_worker.py wrote.

        Raises:
            ValueError: one line that names the file, the place and what is wrong there.
        """
        return record_of(cls, load(path, _FIX), path, _FIX)


@dataclass(frozen=True)
class TracedJob:
    """The traces of a job.

    Attributes:
        facts: for the cost model.
        traces: (p, v) -> one micro-batch through chunk v alone, on the first rank of stage p.
        seconds: that it took.
        traced: how many traces were made, and not found in the cache.
    """

    facts: JobFacts
    traces: dict[Place, Trace]
    seconds: float
    traced: int


class Tracer:
    """Describes and traces jobs; a context manager, which ends its processes.

    Args:
        cache: of earlier answers; the user's own if None.
        workers: processes at a time.
        limit_seconds: that one of them may take.
    """

    def __init__(
        self, cache: TraceCache | None = None, workers: int = 2, limit_seconds: float = 600.0
    ) -> None:
        self._cache = TraceCache() if cache is None else cache
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-mone-")
        self._pools = {
            kind: WorkerPool(kind, Path(self._folder.name) / kind, workers, limit_seconds)
            for kind in (GPU, CPU)
        }

    def __enter__(self) -> Tracer:
        """Start nothing yet: answers in the cache need no process."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.close()
        self._folder.cleanup()

    def describe(self, flags: Sequence[str], world_size: int) -> JobDescription:
        """What the cost model must know of a job, and what each virtual stage holds.

        Args:
            flags: as `megatron_mone.pretrain` takes them.
            world_size: W.

        Raises:
            ValueError: one line; the job is refused, by Megatron or by us.
            RuntimeError: one line; a process failed.
        """
        job = {"flags": list(flags), "world_size": world_size}
        key = _key(DESCRIBE, job)
        described = []

        def take(_index: int, path: Path) -> None:
            described.append(JobDescription.read(path))
            self._cache.put(key, path.read_bytes())

        has_run_file = any(flag.partition("=")[0] == "--config" for flag in flags)
        # A run file may have changed since.
        found = None if has_run_file else self._cache.get(key, JobDescription.read)
        if found is None:
            request = Request(DESCRIBE, job, "the description of the job")
            self._pool(flags).answer([request], take)
            (found,) = described
        return found

    def trace(
        self,
        flags: Sequence[str],
        world_size: int,
        rows_per_expert: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> TracedJob:
        """Trace one micro-batch in every distinct virtual stage.

        Args:
            flags: as `megatron_mone.pretrain` takes them.
            world_size: W.
            rows_per_expert: E rows that one micro-batch on one rank sends to each expert; balanced
                when None.
            progress: told at the start, and of each trace.

        Raises:
            ValueError: one line; the job is refused, or cannot be traced.
            RuntimeError: one line; a process failed.
        """
        started = time.monotonic()
        job = self.describe(flags, world_size)
        first: dict[str, Place] = {}
        for place, key in job.keys.items():
            first.setdefault(key, place)
        asked = {place: _stage_request(job, place, rows_per_expert) for place in first.values()}
        made, traced = self._traces(asked, progress or (lambda _done, _total: None))
        return TracedJob(
            facts=job.facts,
            traces={
                place: _moved(job, made[first[key]], first[key], place)
                for place, key in job.keys.items()
            },
            seconds=time.monotonic() - started,
            traced=traced,
        )

    def _pool(self, flags: Sequence[str]) -> WorkerPool:
        return self._pools[GPU if is_gpu_job(flags) else CPU]

    def _traces(
        self, asked: dict[Place, Request], progress: Progress
    ) -> tuple[dict[Place, Trace], int]:
        """The traces asked for, and how many had to be made."""
        keys = {place: _key(TRACE, request.job) for place, request in asked.items()}
        made: dict[Place, Trace] = {}
        for place, key in keys.items():
            found = self._cache.get(key, Trace.read)
            if found is not None:
                made[place] = found
        missing = [place for place in asked if place not in made]

        def take(index: int, path: Path) -> None:
            made[missing[index]] = Trace.read(path)
            self._cache.put(keys[missing[index]], path.read_bytes())
            progress(len(made), len(asked))

        progress(len(made), len(asked))
        if missing:
            requests = [asked[place] for place in missing]
            self._pool(requests[0].job["flags"]).answer(requests, take)
        return made, len(missing)


def _key(kind: str, job: Mapping[str, Any]) -> str:
    """Of the cache; DeepSpeed's JSON is read by its path, and may have changed since."""
    path = Path(last_value(job["flags"], "--deepspeed-config") or "")
    return cache_key(kind=kind, **job, json=path.read_text() if path.is_file() else "")


def _stage_request(job: JobDescription, place: Place, rows: Sequence[int] | None) -> Request:
    facts = job.facts
    world_size, rank = stage_job(facts.world_size, *place, facts.pp, facts.vp)
    asked = {
        "flags": list(job.stage_flags), "world_size": world_size, "rank": rank,
        "rows": None if rows is None else list(rows),
    }  # fmt: skip
    return Request(TRACE, asked, f"the trace of stage {place[0]}, chunk {place[1]}")


def _moved(job: JobDescription, trace: Trace, traced: Place, place: Place) -> Trace:
    """A stage's trace as that of another with the same key, in the job that was asked for."""
    layers_on = job.first_layers[place] - job.first_layers[traced]
    facts = job.facts
    return in_job(trace, place, facts.pp, facts.vp, facts.world_size, layers_on)
