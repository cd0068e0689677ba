"""The memory ledger of one training step: who holds which bytes when, by kind and phase.

Bytes and times are the allocator's own: torch's profiler records every allocation and free of this
process, those inside an operator and in the threads of gloo included, so that the ledger's level is
the allocator's to the byte. Names come from the same record, by address: what the model and the
optimizer hold before or after the step, what collectives were given, and which allocations autograd
made on the way forward, backward or in a recompute.

A TorchDispatchMode would have been the usual way to names. Under one, autograd adds gradients out
of place (`isTensorSubclassLike`): the watched step would need other memory than the real one.

One profiler at a time: no other may run during the step. Recording slows the step down; its times
order events and are no measure of speed. On CUDA the levels are those of the caching allocator,
which rounds sizes up; that part of the code has not run on a GPU.
"""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common import phases
from megatron_mone.deepspeed.held import held
from megatron_mone.profiling import sharded_buffers
from megatron_mone.profiling.communication import tensors_in

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
ACTIVATIONS = "activations"
TEMPORARIES = "temporaries"
COMMUNICATION = "communication"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARIES, COMMUNICATION)

TIMELINE_POINTS = 400

_MARK = "memory ledger enters "
_FREED = "memory ledger frees "
_COLLECTIVES = ("c10d::", "gloo:", "nccl:")
_NODE = "autograd::engine::evaluate_function"

Storages = dict[int, Any]  # torch.UntypedStorage by address


def persistent_tensors(
    model_chunks: Iterable[Any], optimizer: Any, *, of_experts: bool = False
) -> dict[str, list[Tensor]]:
    """Everything that Megatron keeps from step to step, by kind; views and repeats included.

    Args:
        model_chunks: modules, wrapped in Megatron's DistributedDataParallel or not.
        optimizer: a MegatronOptimizer, chained, distributed or neither, a torch optimizer, or
            DeepSpeed's engine as one.
        of_experts: only what belongs to routed experts, that expert parallelism shards. Megatron
            marks their parameters with `allreduce` = False and keeps their gradients in buffers,
            and their state in optimizers, of their own (get_megatron_optimizer). Of DeepSpeed's
            engine weights alone.
    """
    buffers = ("expert_parallel_buffers",) if of_experts else ("buffers", "expert_parallel_buffers")
    found: dict[str, list[Tensor]] = {WEIGHTS: [], GRADIENTS: [], OPTIMIZER: []}
    for chunk in model_chunks:
        # Megatron's wrapper has a list named `buffers` where a module has the method.
        for module in chunk.modules():
            own = [*module._parameters.values()]
            if of_experts:
                own = [p for p in own if not getattr(p, "allreduce", True)]
            if own or not of_experts:
                found[WEIGHTS] += tensors_in([*own, *module._buffers.values()])
        shards = sharded_buffers.held(chunk, of_experts=of_experts)
        for kind, tensors in zip((WEIGHTS, GRADIENTS, OPTIMIZER), shards, strict=True):
            found[kind] += tensors
        for name in buffers:
            for buffer in vars(chunk).get(name, ()):
                found[WEIGHTS] += tensors_in([buffer.param_data])
                found[GRADIENTS] += tensors_in([buffer.grad_data])
    for single in _single_optimizers(optimizer):
        groups = getattr(single, "param_groups", ())
        if not of_experts or (groups and all(g.get("is_expert_parallel") for g in groups)):
            found[OPTIMIZER] += tensors_in(list(vars(single).values()))
    if not of_experts and (engine := getattr(optimizer, "engine", None)) is not None:
        for kind, tensors in zip((WEIGHTS, GRADIENTS, OPTIMIZER), held(engine), strict=True):
            found[kind] += tensors
    for parameter in found[WEIGHTS] + found[OPTIMIZER]:
        if parameter.is_leaf:  # torch warns about `.grad` of any other
            found[GRADIENTS] += tensors_in([getattr(parameter, "main_grad", None), parameter.grad])
    return {kind: [sharded_buffers.local(one) for one in of_it] for kind, of_it in found.items()}


class MemoryLedger:
    """Records one optimizer step as a context manager; `record()` tells the result.

    Args:
        persistent: the tensors kept from step to step, by kind (`persistent_tensors`). Called
            before and after the step, as a first step makes the optimizer's state.
        others: tensors that are not of this run (of other models in this process) and stay as they
            are during the step; left out of all numbers.
        snapshot: on CUDA, where to write the allocator's history for pytorch.org/memory_viz.
    """

    def __init__(
        self,
        persistent: Callable[[], Mapping[str, Iterable[Tensor]]],
        *,
        others: Callable[[], Iterable[Tensor]] = tuple,
        snapshot: Path | None = None,
    ) -> None:
        self._persistent = persistent
        self._others = others
        self._snapshot = snapshot
        self._profile: Any = None
        self._device = "cpu"
        self._others_bytes = 0
        self._allocator_peak: int | None = None
        self._lives: list[_Life] = []
        self._events: list[_Event] = []
        self._watched: list[weakref.ref] = []

    def enter(self, phase: str) -> None:
        """Say that `phase` begins here; before the first call the step is in `phases.OTHER`."""
        _mark(_MARK + phase)

    def __enter__(self) -> MemoryLedger:
        named = self._persistent()
        self._device = next((t.device.type for t in named[WEIGHTS]), "cpu")
        self._begin(_storages(named, self._device))
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            if self._snapshot:
                torch.cuda.memory._record_memory_history()
        self._profile = torch.autograd.profiler.profile(
            profile_memory=True, record_shapes=True, use_kineto=True
        )
        self._profile.__enter__()
        self.enter(phases.OTHER)
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        self._watched.clear()
        if self._device == "cuda":
            self._allocator_peak = torch.cuda.max_memory_allocated() - self._others_bytes
            if self._snapshot:
                torch.cuda.memory._dump_snapshot(str(self._snapshot))
                torch.cuda.memory._record_memory_history(enabled=None)
        if error[0] is None:
            self._events = _read(self._profile.kineto_results, self._device)
            kept = _storages(self._persistent(), self._device)
            _follow(self._events, self._lives, kept, set(_reachable(self._device)))
        self._profile = None

    def _begin(self, named: dict[str, Storages]) -> None:
        """Take down what is alive before the step."""
        others = _storages({"": self._others()}, self._device)[""]
        if self._device == "cuda":
            # At once, and so with what C++ holds and what the allocator adds in rounding up.
            self._others_bytes = _bytes(others)
            rest = torch.cuda.memory_allocated() - self._others_bytes
            rest -= sum(_bytes(storages) for storages in named.values())
            self._lives.append(_Life(0, rest, kind=TEMPORARIES))
            held = named
        else:
            known = others.keys() | {a for storages in named.values() for a in storages}
            found = _reachable(self._device).items()
            held = {**named, TEMPORARIES: {a: s for a, s in found if a not in known}}
        for kind, storages in held.items():
            for address, storage in storages.items():
                self._lives.append(_Life(address, storage.nbytes(), kind=kind))
                # torch's profiler is silent about the end of what it has not seen made.
                end = functools.partial(_mark, f"{_FREED}{address}")
                self._watched.append(weakref.ref(storage, end))

    @property
    def base_bytes(self) -> int:
        """Bytes alive before the step: what the growth of the process adds to."""
        return sum(life.size for life in self._lives if life.made < 0)

    def record(self) -> dict[str, Any]:
        """The "memory" object of a rank file (docs/PROFILER.md), without `process_peak_bytes`.

        Raises:
            RuntimeError: no step was recorded to its end.
        """
        if not self._events:
            raise RuntimeError("the memory ledger recorded no whole step")
        points = _levels(self._events, self._lives)
        peak = max(points, key=lambda point: point.total)
        by_phase: dict[str, dict[str, int]] = {}
        for point in points:
            most = by_phase.setdefault(point.phase, dict.fromkeys(KINDS, 0))
            for kind in KINDS:
                most[kind] = max(most[kind], point.levels[kind])
        allocator_peak = self._allocator_peak
        return {
            "peak_bytes": peak.total,
            "peak_phase": peak.phase,
            "peak_pass": peak.during,
            "peak_ms": peak.ms,
            "by_kind": peak.levels,
            "by_phase": by_phase,
            "timeline": _timeline(points),
            "measured": {
                "allocator_peak_bytes": peak.total if allocator_peak is None else allocator_peak
            },
        }


@dataclass(slots=True)
class _Event:
    """One moment of the step.

    Attributes:
        ns: time.
        what: "memory" (made or freed), "given" (to a collective), "node" (of autograd's backward
            begins), "pass", or "phase".
        address: of the storage made, freed or given.
        size: bytes made; negative: freed.
        during: pass (`phases.PASSES`); empty in a thread that has none of its own.
        collective: made inside a collective.
        phase: that begins here, or, once followed, that the moment is in.
    """

    ns: int
    what: str
    address: int = 0
    size: int = 0
    during: str = ""
    collective: bool = False
    phase: str = ""


@dataclass(slots=True)
class _Life:
    """One storage: what is known of it and the events (by index) that made and freed it."""

    address: int
    size: int
    kind: str = ""
    made: int = -1  # before the step
    freed: int | None = None
    given: int | None = None  # last beginning or end of a collective that had it


@dataclass(slots=True)
class _Point:
    """Bytes of each kind after one event."""

    ms: float
    phase: str
    during: str
    levels: dict[str, int]
    total: int


def _single_optimizers(optimizer: Any) -> Iterator[Any]:
    """The optimizer and those inside it, outermost first."""
    yield optimizer
    held = vars(optimizer)
    inner = [*held.get("chained_optimizers", ()), *held.get("sub_optimizers", ())]
    if held.get("optimizer") is not None:
        inner.append(held["optimizer"])
    for other in inner:
        yield from _single_optimizers(other)


def _storages(named: Mapping[str, Iterable[Tensor]], device: str) -> dict[str, Storages]:
    """Storages of each kind; one that two kinds share belongs to the first."""
    seen: set[int] = set()
    found: dict[str, Storages] = {}
    for kind, tensors in named.items():
        storages = found[kind] = {}
        for tensor in tensors:
            if tensor.device.type != device:
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                storages[storage.data_ptr()] = storage
        seen |= set(storages)
    return found


def _bytes(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def _reachable(device: str) -> Storages:
    """Storages, allocated by torch, of the tensors that Python can reach."""
    plain = [
        value
        for value in gc.get_objects()
        if type(value) in (Tensor, torch.nn.Parameter)  # a subclass need not have a storage
        and value.device.type == device
        and value.layout == torch.strided
    ]
    storages = _storages({TEMPORARIES: plain}, device)[TEMPORARIES]
    # What torch did not allocate (a mapped file, an array of numpy's) cannot be resized.
    return {address: storage for address, storage in storages.items() if storage.resizable()}


def _mark(name: str, ended: object = None) -> None:
    """Leave a mark among the profiler's events, if need be as the callback of a weak reference."""
    with torch._C._profiler._RecordFunctionFast(name):
        pass


def _read(results: Any, device: str) -> list[_Event]:
    """The profiler's tree of events as one list in the order of time."""
    tree = results.experimental_event_tree()
    begin = next(event for event in tree if event.name.startswith(_MARK))
    found: list[_Event] = []
    for event in tree:
        # The threads of gloo have no pass of their own.
        own = event.start_tid == begin.start_tid or event.name.startswith(_NODE)
        if own:
            found.append(_Event(event.start_time_ns, "pass", during=phases.FORWARD))
        _walk(event, phases.FORWARD if own else "", False, device, found)
    # Python's sort keeps the order in which a thread met events of one time.
    return sorted(found, key=lambda event: event.ns)


def _walk(event: Any, during: str, collective: bool, device: str, found: list[_Event]) -> None:
    """Append what `event` and its children tell, given the pass and collective around it."""
    kinds = torch._C._profiler._EventType
    extra, ns = event.extra_fields, event.start_time_ns
    if event.tag == kinds.Allocation:
        if extra.device.type == device:
            change = (extra.ptr, extra.alloc_size, during, collective)
            found.append(_Event(ns, "memory", *change))
    elif event.tag == kinds.TorchOp:
        if event.name.startswith(_MARK):
            phase = event.name.removeprefix(_MARK)
            found.append(_Event(ns, "phase", during=during, phase=phase))
        if event.name.startswith(_FREED):
            address = int(event.name.removeprefix(_FREED))
            found.append(_Event(ns, "memory", address, -1, during))
        if event.name.startswith(_NODE):
            found.append(_Event(ns, "node", during=phases.BACKWARD))
        if _is_node(event):
            during = phases.BACKWARD
        collective = collective or event.name.startswith(_COLLECTIVES)
        if collective:
            for address in _addresses(extra.inputs):
                found.append(_Event(ns, "given", address))
                found.append(_Event(event.end_time_ns, "given", address))
    recomputed = _recomputed(event) if during == phases.BACKWARD else 0
    for index, child in enumerate(event.children):
        inner = phases.RECOMPUTE if index < recomputed else during
        _walk(child, inner, collective, device, found)


def _is_node(event: Any) -> bool:
    """Whether this is a node of the backward graph, or the engine's work around one."""
    backward = torch._C._profiler.RecordScope.BACKWARD_FUNCTION
    return event.name.startswith(_NODE) or event.extra_fields.scope == backward


def _recomputed(event: Any) -> int:
    """How many of a backward node's children are the forward that it runs again.

    Autograd numbers an operator (from 0) only where gradients are on, which they are in a backward
    for nothing but a recompute. Whatever comes before the last such operator belongs to it too.
    """
    is_operator = torch._C._profiler._EventType.TorchOp
    numbered = [
        index
        for index, child in enumerate(event.children)
        if child.tag == is_operator
        and child.extra_fields.sequence_number >= 0
        and not _is_node(child)
    ]
    return numbered[-1] + 1 if numbered else 0


def _addresses(inputs: Any) -> list[int]:
    """Addresses of the storages among an operator's arguments."""
    found: list[int] = []
    for value in inputs:
        if isinstance(value, torch._C._profiler._TensorMetadata):
            if value.storage_data_ptr:
                found.append(value.storage_data_ptr)
        elif isinstance(value, (list, tuple)):
            found += _addresses(value)
    return found


def _follow(
    events: list[_Event], lives: list[_Life], kept: dict[str, Storages], reachable: set[int]
) -> None:
    """Give every storage its life and kind, and every event its phase and pass.

    Args:
        events: in order of time; changed.
        lives: those that began before the step; the others are appended.
        kept: persistent storages after the step, by kind.
        reachable: addresses of the storages that Python can reach after the step.
    """
    alive = {life.address: life for life in lives}
    phase, during = phases.OTHER, phases.FORWARD
    for index, event in enumerate(events):
        phase = event.phase = event.phase or phase
        during = event.during = event.during or during
        if event.what == "given" and event.address in alive:
            alive[event.address].given = index
        elif event.what == "memory":
            life = alive.pop(event.address, None)
            if life is not None:
                # A new one at its place tells of a free that was not seen.
                life.freed = index if event.size < 0 else life.given or index
            if event.size > 0:
                life = alive[event.address] = _Life(event.address, event.size, made=index)
                life.given = index if event.collective else None
                lives.append(life)
    for kind, storages in kept.items():
        for address in storages:
            if address in alive and alive[address].made >= 0:
                alive[address].kind = kind
    for life in alive.values():
        # A thread of the process group's dropped the last reference once the exchange was done.
        if life.given is not None and life.address not in reachable:
            life.freed = life.given
    _decide(events, lives)


def _decide(events: list[_Event], lives: list[_Life]) -> None:
    """Kinds of the storages that nobody named."""
    begun = 0
    nodes = []  # how many backward nodes have begun, after each event
    for event in events:
        begun += event.what == "node"
        nodes.append(begun)
    for life in lives:
        if life.kind in (WEIGHTS, GRADIENTS, OPTIMIZER):
            continue
        last = -1 if life.freed is None else life.freed
        if life.given is not None:
            life.kind = COMMUNICATION
        elif (
            life.made >= 0
            and events[life.made].during != phases.BACKWARD
            and nodes[last] > nodes[life.made]
        ):
            life.kind = ACTIVATIONS
        else:
            life.kind = TEMPORARIES


def _levels(events: list[_Event], lives: list[_Life]) -> list[_Point]:
    """Bytes of each kind after every event."""
    levels = dict.fromkeys(KINDS, 0)
    changes: dict[int, list[tuple[str, int]]] = {}
    for life in lives:
        if life.made < 0:
            levels[life.kind] += life.size
        else:
            changes.setdefault(life.made, []).append((life.kind, life.size))
        if life.freed is not None:
            changes.setdefault(life.freed, []).append((life.kind, -life.size))
    points = []
    for index, event in enumerate(events):
        for kind, size in changes.get(index, ()):
            levels[kind] += size
        if index in changes or event.what == "phase":
            ms = (event.ns - events[0].ns) / 1e6
            points.append(_Point(ms, event.phase, event.during, dict(levels), sum(levels.values())))
    return points


def _timeline(points: list[_Point]) -> dict[str, list[Any]]:
    """At most TIMELINE_POINTS points: of equal stretches of events the lowest and the highest."""
    stretches = min(len(points), TIMELINE_POINTS // 2)
    bounds = [len(points) * i // stretches for i in range(stretches + 1)]
    chosen: list[int] = []
    for begin, end in itertools.pairwise(bounds):
        extremes = {pick(range(begin, end), key=lambda i: points[i].total) for pick in (min, max)}
        chosen += sorted(extremes)
    kept = [points[i] for i in chosen]
    lines: dict[str, list[Any]] = {"ms": [p.ms for p in kept], "phase": [p.phase for p in kept]}
    return lines | {kind: [p.levels[kind] for p in kept] for kind in KINDS}
