"""Search: the fastest layouts of one model on given devices, by branch and bound.

Every layout of the axes (layout_axes.py) has two lower bounds (bounds.py): one from small groups,
one from the trace of its sharding. The layout of the least bound is looked at next: its sharding is
traced, or, where that was, it is planned. The search ends where the least bound left is above the
time of the layouts found, or at its limit. What cannot fit is left out by bytes: even empty of
activations (hopeless), or with those that it keeps. More recomputation is tried only where a layout
does not fit without. Precision and the host are the user's to allow: less precise state is then
tried of every layout, offloading where one does not fit without; both are where nothing fits
otherwise. The fastest are planned from whole traces.
May touch: the tracer's processes and cache, by way of the Planner.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from megatron_mone.planning.bounds import Bounds
from megatron_mone.planning.composed import Composer, layer_kinds
from megatron_mone.planning.cost.documents import with_documents
from megatron_mone.planning.job import NO_OFFLOAD, NO_RECOMPUTE, JobSpec, short_layout
from megatron_mone.planning.layout_axes import (
    ALLOWABLE,
    ALLOWED,
    LEFT_OUT,
    NEEDED,
    Axes,
    Pipeline,
    Shards,
    all_shards,
    all_stages,
    axes_of,
)
from megatron_mone.planning.layout_model import Model
from megatron_mone.planning.planner import Planned, Planner
from megatron_mone.planning.scaled_bound import Bound, Scaled
from megatron_mone.planning.small_groups import SmallGroups
from megatron_mone.planning.stage_split import even_split

SLOWER, TOO_LARGE, LIMIT, INTERRUPT = "slower", "too large", "limit", "interrupt"
WHYS = (SLOWER, TOO_LARGE, LIMIT, INTERRUPT)
WHOLE = 5  # of the fastest that fit, how many are planned again, from whole traces


@dataclass(frozen=True)
class Candidate:
    """A layout that was planned.

    Attributes:
        layout: in short.
        planned: what came of it.
    """

    layout: str
    planned: Planned


@dataclass
class Found:
    """What a search found.

    Attributes:
        candidates: planned, fastest first.
        refused: (layout, reason) of those Megatron refuses.
        hopeless: layouts whose weights, gradients and optimizer alone pass the device's memory.
        not_tried: why, of WHYS -> how many layouts.
        least_seconds: of the layouts of the limit, or of an interrupt, the least bound.
        axes: those of ALLOWABLE that there are -> of AXIS_USES: whether they were tried.
    """

    candidates: list[Candidate] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    hopeless: list[str] = field(default_factory=list)
    not_tried: Counter[str] = field(default_factory=Counter)
    least_seconds: float | None = None
    axes: dict[str, str] = field(default_factory=dict)

    @property
    def fitting(self) -> list[Candidate]:
        """Those that fit, fastest first."""
        return sorted((c for c in self.candidates if c.planned.prediction.fits), key=_seconds)


class LowerBounds(Protocol):
    """What a search asks of bounds.py."""

    every: Axes

    def axes(self, allowed: Collection[str]) -> Axes:
        """What is tried of every sharding where a user allows so much, of ALLOWABLE."""

    def pipelines(self, shards: Shards, pp: int, vpp: int) -> list[Pipeline]:
        """Splits of the layers."""

    def first(self, shards: Shards, pipeline: Pipeline) -> Bound:
        """Before the sharding is traced."""

    def second(self, shards: Shards, pipeline: Pipeline) -> Bound:
        """Once it is."""


class NoBounds(LowerBounds):
    """Of models whose stages cannot be put together: every layout is traced whole."""

    every = Axes()

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def axes(self, allowed: Collection[str]) -> Axes:
        """The job's own alone, where there are no others."""
        return self.every.within(allowed)

    def pipelines(self, shards: Shards, pp: int, vpp: int) -> list[Pipeline]:
        """Megatron's own."""
        even = even_split(self._layers, pp, vpp)
        return [] if even is None else [Pipeline(pp, vpp, even, True)]

    def first(self, shards: Shards, pipeline: Pipeline) -> Bound:
        """Nothing is known."""
        return Bound(0.0, 0.0, 0.0)

    second = first


def search(
    planner: Planner,
    job: JobSpec,
    gpus: int,
    limit: int,
    best: int,
    progress: Callable[[int, int, str], None] | None = None,
    allowed: Collection[str] = (),
) -> Found:
    """Plan up to `limit` layouts; an interrupt ends it with what there is.

    Args:
        planner: of the cluster.
        job: whose layout is changed.
        gpus: W.
        limit: layouts to plan; refused and hopeless ones do not count.
        best: of the fastest that fit, how many are sought, from 1.
        progress: told (planned, limit, layout).
        allowed: of ALLOWABLE, axes to try beside; those left out are where nothing fits without.

    Raises:
        ValueError: one line; Megatron refuses the model in every layout, or DeepSpeed steps it.
    """
    model, bounds, composer = prepared(planner, job, gpus)
    run = _Run(planner, composer, model, bounds, limit, best, progress, allowed)
    try:
        run.begin()
        run.go_on()
        if not run.found.fitting and run.allow_all():
            run.go_on()
        for one in run.found.fitting[: min(best, WHOLE)]:
            place = run.found.candidates.index(one)
            again = planner.plan(one.planned.job, gpus)
            run.found.candidates[place] = replace(one, planned=again)
    except KeyboardInterrupt:
        run.stop(INTERRUPT)
    run.found.candidates.sort(key=_seconds)
    return run.found


def prepared(planner: Planner, job: JobSpec, gpus: int) -> tuple[Model, LowerBounds, Composer]:
    """What a search begins with.

    Raises:
        ValueError: one line; as of `search`.
    """
    smallest = job.with_layout(Shards(1, 1, 1, 1, 1).fields)
    smallest = smallest.with_layout(Pipeline(1, 1, (), True).fields(0))
    description = planner.tracer.describe(planner.flags(smallest), 1)
    facts = with_documents(description.facts, planner.document_tokens)
    facts = replace(facts, world_size=gpus)
    if facts.zero_stage is not None:
        raise ValueError(
            f"{job.name}: a search with engine = 'deepspeed' is not made: what ZeRO shards is not "
            "composed of layers; plan its layouts one by one, or give engine = megatron"
        )
    if facts.fsdp:
        raise ValueError(
            f"{job.name}: a search with use_megatron_fsdp = True is not made: what it cuts is not "
            "composed of layers; plan its layouts one by one, or leave it out"
        )
    composer = Composer(planner)
    kinds = layer_kinds(job, description.keys)
    mtp = int(job.values().get("mtp_num_layers") or 0)
    model = Model(smallest, facts, tuple(kinds or ()), mtp, gpus)
    if kinds is None:
        return model, NoBounds(facts.num_layers), composer
    axes = axes_of(facts, job.values(), planner.cluster.host is not None)
    groups = SmallGroups(composer, model, axes.recomputes)
    scaled = Scaled(groups, planner.cluster, planner.efficiency)
    return model, Bounds(scaled, composer, planner, axes), composer


@dataclass(frozen=True, order=True)
class _Entry:
    """A layout that waits for its turn: the least bound first, then who is likely to be fast."""

    seconds: float
    guess: tuple[float, ...]
    shards: Shards
    pipeline: Pipeline
    traced: bool


class _Run:
    """One search as it goes on."""

    def __init__(
        self,
        planner: Planner,
        composer: Composer,
        model: Model,
        bounds: LowerBounds,
        limit: int,
        best: int,
        progress: Callable[[int, int, str], None] | None,
        allowed: Collection[str],
    ) -> None:
        self._planner, self._composer, self._model = planner, composer, model
        self._bounds, self._limit, self._best = bounds, limit, best
        self._progress = progress
        self._memory = planner.cluster.device.memory_bytes
        self._waiting: list[_Entry] = []
        self._refused: dict[Shards, str] = {}
        self._seen: set[tuple[Shards, Pipeline]] = set()
        self._unfit: list[tuple[Shards, Pipeline, bool]] = []
        self._seconds: list[float] = []  # of layouts that fit, in order
        self._stopped = False
        self._axes = bounds.axes(allowed)
        uses = {name: ALLOWED if name in allowed else LEFT_OUT for name in bounds.every.allowed}
        self.found = Found(axes=uses)

    def begin(self) -> None:
        """Bound every layout without recomputation and offloading, in every precision allowed."""
        model = self._model
        for shards in all_shards(model.facts, model.gpus, self._planner.cluster.domain.devices):
            for pp, vpp in all_stages(shards, model.facts, model.gpus):
                for pipeline in self._bounds.pipelines(shards, pp, vpp):
                    for state in self._axes.faster:
                        self._consider(replace(shards, state=state), pipeline)

    def allow_all(self) -> bool:
        """Have what was not allowed tried of all that does not fit; whether there is anything."""
        left_out = [name for name, use in self.found.axes.items() if use == LEFT_OUT]
        if not left_out or self._stopped:
            return False
        self.found.axes |= dict.fromkeys(left_out, NEEDED)
        self._axes = self._bounds.axes(ALLOWABLE)
        for shards, pipeline, hopeless in list(self._unfit):
            self._consider_smaller(shards, pipeline, hopeless)
        return True

    def go_on(self) -> None:
        """Look at the layout of the least bound, until none left can be among the fastest."""
        while self._waiting:
            if len(self.found.candidates) >= self._limit:
                return self.stop(LIMIT)
            if self._waiting[0].seconds >= self._cutoff():
                return self.stop(SLOWER)
            entry = heapq.heappop(self._waiting)
            try:
                self._look_at(entry)
            except KeyboardInterrupt:
                heapq.heappush(self._waiting, entry)
                raise
        return None

    def stop(self, why: str) -> None:
        """Count what is left, once."""
        if self._stopped:
            return
        self._stopped = True
        for entry in self._waiting:
            if entry.shards in self._refused:
                self._refuse(entry.shards, entry.pipeline, self._refused[entry.shards])
            else:
                slower = entry.seconds >= self._cutoff()
                self.found.not_tried[SLOWER if slower else why] += 1
        left = [one.seconds for one in self._waiting if one.seconds < self._cutoff()]
        if left and why != SLOWER:
            self.found.least_seconds = min(left)

    def _cutoff(self) -> float:
        """Seconds of the slowest layout that is sought."""
        full = len(self._seconds) >= self._best
        return self._seconds[self._best - 1] if full else float("inf")

    def _consider(self, shards: Shards, pipeline: Pipeline) -> None:
        if (shards, pipeline) in self._seen:
            return None
        self._seen.add((shards, pipeline))
        if shards in self._refused:
            return self._refuse(shards, pipeline, self._refused[shards])
        return self._take(shards, pipeline, self._bounds.first(shards, pipeline), False)

    def _take(self, shards: Shards, pipeline: Pipeline, bound: Bound, traced: bool) -> None:
        """Let a layout wait, unless it cannot fit: then what is like it and smaller."""
        if bound.held > self._memory:
            self.found.hopeless.append(self._name(shards, pipeline))
        elif bound.peak > self._memory:
            self.found.not_tried[TOO_LARGE] += 1
        else:
            guess = _guess(shards, pipeline, self._model)
            entry = _Entry(bound.seconds, guess, shards, pipeline, traced)
            return heapq.heappush(self._waiting, entry)
        hopeless = bound.held > self._memory
        self._unfit.append((shards, pipeline, hopeless))
        return self._consider_smaller(shards, pipeline, hopeless)

    def _consider_smaller(self, shards: Shards, pipeline: Pipeline, hopeless: bool) -> None:
        """The same layout with more recomputation, offloading, or less state on the device."""
        axes = self._axes
        plain = shards.recompute == NO_RECOMPUTE and shards.offload == NO_OFFLOAD
        if plain and not hopeless:
            for recompute in axes.recomputes[1:]:
                self._consider(replace(shards, recompute=recompute), pipeline)
            for offload in axes.offloads[1:]:
                self._consider(replace(shards, offload=offload), pipeline)
        for state in axes.states[axes.states.index(shards.state) + 1 :]:
            self._consider(replace(shards, state=state), pipeline)

    def _look_at(self, entry: _Entry) -> None:
        """Trace the layout's sharding, or plan it."""
        shards, pipeline = entry.shards, entry.pipeline
        if shards in self._refused:
            return self._refuse(shards, pipeline, self._refused[shards])
        name = self._name(shards, pipeline)
        if self._progress is not None:
            self._progress(len(self.found.candidates), self._limit, name)
        if not entry.traced:
            try:
                bound = self._bounds.second(shards, pipeline)
            except ValueError as error:
                self._refused[shards] = str(error)
                return self._refuse(shards, pipeline, str(error))
            seconds = max(bound.seconds, entry.seconds)
            return self._take(shards, pipeline, replace(bound, seconds=seconds), True)
        try:
            planned = self._composer.plan(self._job(shards, pipeline), self._model.gpus)
        except ValueError as error:
            return self._refuse(shards, pipeline, str(error))
        self.found.candidates.append(Candidate(name, planned))
        if planned.prediction.fits:
            bisect.insort(self._seconds, planned.prediction.seconds)
        else:
            self._unfit.append((shards, pipeline, False))
            self._consider_smaller(shards, pipeline, hopeless=False)
        return None

    def _refuse(self, shards: Shards, pipeline: Pipeline, reason: str) -> None:
        self.found.refused.append((self._name(shards, pipeline), reason))

    def _job(self, shards: Shards, pipeline: Pipeline) -> JobSpec:
        fields = {**shards.fields, **pipeline.fields(self._model.mtp)}
        return self._model.job.with_layout(fields)

    def _name(self, shards: Shards, pipeline: Pipeline) -> str:
        return short_layout(self._job(shards, pipeline).values())


def _guess(shards: Shards, pipeline: Pipeline, model: Model) -> tuple[float, ...]:
    """A rough guess of what costs time; it orders layouts of equal bounds alone."""
    samples = shards.mbs * (model.gpus // (shards.tp * shards.cp * pipeline.pp))
    micro_batches = model.facts.global_batch_size / samples
    bubble = (pipeline.pp - 1) / micro_batches / pipeline.vpp
    costs = 0.1 * shards.tp.bit_length() + 0.15 * shards.etp.bit_length() + bubble
    return costs + 0.05 * shards.cp.bit_length(), float(pipeline.vpp), float(shards.ep)


def _seconds(candidate: Candidate) -> float:
    return candidate.planned.prediction.seconds


def pareto(candidates: Sequence[Candidate]) -> set[str]:
    """Layouts than which none is both faster and smaller; `candidates` fastest first."""
    front, least = set(), float("inf")
    for one in candidates:
        peak = one.planned.prediction.peak
        if peak < least:
            front.add(one.layout)
            least = peak
    return front


def explain(one: Candidate, best: Candidate) -> str:
    """Why a layout is as fast as it is, and what it loses to the fastest."""
    prediction, first = one.planned.prediction, best.planned.prediction
    shares = sorted(prediction.parts.items(), key=lambda part: -part[1])
    spent = ", ".join(
        f"{100 * seconds / prediction.seconds:.0f}% {name}"
        for name, seconds in shares
        if seconds > 0.01 * prediction.seconds
    )
    if one is best:
        return spent
    losses = {
        name: prediction.parts.get(name, 0.0) - first.parts.get(name, 0.0)
        for name in {**prediction.parts, **first.parts}
    }
    worst = max(losses, key=lambda name: losses[name])
    slower = 100 * (prediction.seconds / first.seconds - 1)
    return f"{spent}; {slower:.1f}% slower, most of it {worst} (+{1e3 * losses[worst]:.0f} ms)"
