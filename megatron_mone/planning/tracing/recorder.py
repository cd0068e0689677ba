"""Recorder: notes operators, collectives and tensors kept for backward, as they happen.

Of the host it notes what it does beside launching: nodes of autograd and waits for the device.
`LiveBytes` counts what the tensors of a program hold at once: every storage once, from the operator
that made it until Python lets go of it. Autograd under a dispatch mode adds gradients out of place,
so that a backward pass shows slightly more than it needs without.
May touch: a PhaseClock, which it asks for the phase and pass under way; torch's FLOP formulas;
`torch.UntypedStorage.resize_`, while entered.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron_mone.common.patch import Replaced
from megatron_mone.common.phases import BACKWARD, FORWARD, RECOMPUTE
from megatron_mone.common.phases import OPTIMIZER as OPTIMIZER_PHASE
from megatron_mone.planning.tracing.host_tensors import HostTensors
from megatron_mone.planning.tracing.trace import (
    DEVICE_WAIT,
    FUNCTION_NODE,
    NODE,
    Collective,
    Op,
    StageMemory,
)
from megatron_mone.profiling.clock import PhaseClock
from megatron_mone.profiling.communication import GROUP_NAMES, tensors_in
from megatron_mone.profiling.flop_counter import FlopCounter
from megatron_mone.profiling.ledger import GRADIENTS, OPTIMIZER, WEIGHTS


class LiveBytes:
    """Counts storages that are noted, until they end.

    Args:
        pass_of: asked which pass is under way; peaks are kept by its answer.

    Attributes:
        now: bytes that are held.
        peaks: pass -> the most bytes that were held in it.
        base: of `now`, what was there when the step was begun to be watched.
    """

    def __init__(self, pass_of: Callable[[], str]) -> None:
        self._pass_of = pass_of
        self.base = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.now = 0
        self.peaks: dict[str, int] = {}

    def note(self, tensor: Tensor) -> None:
        """A tensor was made; one whose storage is known changes nothing."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._references[key] = weakref.ref(storage, lambda _gone: self._forget(key))
        self._change(key, storage.nbytes())

    def begin_with(self, tensors: Iterable[Tensor]) -> None:
        """Know tensors that are there from before, so that their end is seen; no part of peaks."""
        for tensor in tensors:
            self.note(tensor)
        self.base, self.peaks = self.now, {}

    @contextmanager
    def watching_sizes(
        self, told: Callable[[torch.UntypedStorage], None] | None = None
    ) -> Iterator[None]:
        """While it lasts, a storage that is resized (freed under its tensor) counts as it is.

        Args:
            told: of every storage that was resized.
        """
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, *size: Any) -> Any:
            result = resize(storage, *size)
            if storage._cdata in self._sizes:
                self._change(storage._cdata, storage.nbytes())
            if told is not None:
                told(storage)
            return result

        with Replaced(torch.UntypedStorage, "resize_", resized):
            yield

    def _change(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        at = self._pass_of()
        self.peaks[at] = max(self.peaks.get(at, 0), self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._references[key]


class KeptBytes:
    """Sizes of storages that autograd keeps, as they were last; holds none of them alive, so that a
    backward pass frees them as it goes."""

    def __init__(self) -> None:
        self._sizes: list[tuple[int, int]] = []
        self._places: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def note(self, storage: torch.UntypedStorage) -> None:
        """It is kept; once it is known that changes nothing."""
        key = storage._cdata
        if key not in self._places:
            self._places[key] = len(self._sizes)
            self._sizes.append((key, storage.nbytes()))
            self._references[key] = weakref.ref(storage, lambda _gone: self._forget(key))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size now."""
        place = self._places.get(storage._cdata)
        if place is not None:
            self._sizes[place] = storage._cdata, storage.nbytes()

    def found(self) -> list[tuple[int, int]]:
        """(identity, bytes) of each."""
        return list(self._sizes)

    def _forget(self, key: int) -> None:
        del self._places[key], self._references[key]


aten = torch.ops.aten

# New storage that nothing is written to.
_UNWRITTEN = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
              aten.new_empty_strided, aten.empty_permuted)  # fmt: skip
# What writes over its first input without reading it.
_OVERWRITING = (aten.zero_, aten.fill_, aten.copy_)
# What Python learns of a tensor on the device, for which it waits.
_ASKING = (aten._local_scalar_dense, aten.equal, aten.is_nonzero)
# What reads of its first input the entries that another one names.
_PICKING = (aten.embedding, aten.index, aten.index_select, aten.gather, aten.masked_select)


class Recorder:
    """Notes what happens while its clock runs.

    Attributes:
        clock: of the phases.
        ops, collectives: in order, not merged.
        live: bytes of what the step makes; its passes are those of the clock, and the optimizer.
        in_pass: as of the collectives that are noted.
        host: whose tensors are no bytes of the device.
    """

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock
        self.ops: list[Op] = []
        self.collectives: list[Collective] = []
        self._formulas = FlopCounter().flop_registry
        self._kept = KeptBytes()
        self._handed: dict[Any, tuple[int, int]] = {}
        self.live = LiveBytes(self._pass)
        self.in_pass: bool | None = None
        self.earlier: list[Collective] | None = None
        self.gathered: set[int] = set()
        self.host = HostTensors()
        self._beside: Counter[tuple[str, str, str]] = Counter()

    @property
    def _records(self) -> bool:
        return self.clock.running and self.earlier is None

    def _pass(self) -> str:
        return OPTIMIZER_PHASE if self.clock.phase == OPTIMIZER_PHASE else self.clock.pass_

    def saw_operator(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """An operator ran; views and unwritten memory are no work."""
        if not self.clock.running and not self.host:
            return
        inputs, outputs = list(tensors_in((args, kwargs))), list(tensors_in((result,)))
        if func.overloadpacket in _ASKING and any(tensor.is_meta for tensor in inputs):
            self.saw_wait()
        if not outputs or _is_view(func):
            return
        if (of_host := self.host.saw(func, inputs, outputs)) is not None:
            for name, moved, written in of_host:
                self._note(name, inputs, outputs, str(outputs[0].dtype), moved, written)
            return
        if not self._records:
            return
        if not _is_in_place(func):
            for output in outputs:
                self.live.note(output)
        if func.overloadpacket in _UNWRITTEN:
            return
        formula = self._formulas.get(func.overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        read = None
        if func.overloadpacket in _OVERWRITING:
            read = sum(tensor.nbytes for tensor in inputs[1:])
        if func.overloadpacket in _PICKING:
            picked = sum(tensor.nbytes for tensor in outputs)
            picked += sum(t.nbytes for t in inputs if not t.is_floating_point())
            read = min(picked, sum(tensor.nbytes for tensor in inputs))
        self.note(str(func.overloadpacket), inputs, outputs, flops, read=read)

    def note(
        self,
        name: str,
        inputs: Iterable[Tensor],
        outputs: Iterable[Tensor],
        flops: int,
        *,
        dtype: torch.dtype | None = None,
        read: int | None = None,
        phase: str | None = None,
    ) -> None:
        """Take down one operator in the phase under way.

        Args:
            name: of the operator.
            inputs, outputs: its tensors.
            flops: its operations.
            dtype: in which it multiplies; of the first output when None.
            read: bytes; of all inputs when None.
            phase: another one than that under way.
        """
        inputs, outputs = list(inputs), list(outputs)
        moved = sum(tensor.nbytes for tensor in inputs) if read is None else read
        written = sum(tensor.nbytes for tensor in outputs)
        kind = str(outputs[0].dtype if dtype is None else dtype)
        self._note(name, inputs, outputs, kind, moved, written, flops, phase)

    def _note(
        self,
        name: str,
        inputs: Iterable[Tensor],
        outputs: Iterable[Tensor],
        dtype: str,
        read: int,
        written: int,
        flops: int = 0,
        phase: str | None = None,
    ) -> None:
        if not self._records:
            return
        self.ops.append(
            Op(
                name=name,
                inputs=tuple(tuple(tensor.shape) for tensor in inputs),
                outputs=tuple(tuple(tensor.shape) for tensor in outputs),
                dtype=dtype.removeprefix("torch."),
                bytes_read=read,
                bytes_written=written,
                flops=flops,
                phase=self.clock.phase if phase is None else phase,
                pass_=self.clock.pass_,
            )
        )

    def saw_wait(self) -> None:
        """The host waited until the device had come to this point."""
        if self._records:
            self._beside[DEVICE_WAIT, self.clock.phase, self.clock.pass_] += 1

    def saw_node(self, is_function: bool, again: bool) -> None:
        """A node of autograd ran in the phase under way, and was made in the pass before.

        Args:
            is_function: whether its code is Python's, a torch.autograd.Function.
            again: whether it was made by a recompute.
        """
        if self._records:
            name = FUNCTION_NODE if is_function else NODE
            for pass_ in (BACKWARD, RECOMPUTE if again else FORWARD):
                self._beside[name, self.clock.phase, pass_] += 1

    def work_beside(self) -> list[Op]:
        """What was noted of the host: ops that move nothing."""
        return [
            Op(name, (), (), "none", 0, 0, 0, phase, pass_, count)
            for (name, phase, pass_), count in self._beside.items()
        ]

    @contextmanager
    def watch_nodes(self) -> Iterator[None]:
        """While it lasts every node of autograd that runs is noted."""
        engine = torch.autograd.Variable._execution_engine

        class Watched:
            def __getattr__(self, name: str) -> Any:
                return getattr(engine, name)

            @staticmethod
            def run_backward(tensors: Iterable[Tensor], *given: Any, **named: Any) -> Any:
                again = torch._C._current_graph_task_id() != -1
                tensors = tuple(tensors)
                for node in _nodes(tensors):
                    is_function = isinstance(node, torch.autograd.function.BackwardCFunction)
                    node.register_prehook(_noting(self, is_function, again))
                return engine.run_backward(tensors, *given, **named)

        with Replaced(torch.autograd.Variable, "_execution_engine", Watched()):
            yield

    def saw_collective(self, kind: str, size: int, group: dist.ProcessGroup) -> None:
        """A collective of more than one rank was launched."""
        if not self.clock.running:
            return
        ranks = dist.get_process_group_ranks(group)
        (self.collectives if self.earlier is None else self.earlier).append(
            Collective(
                kind=kind,
                bytes=size,
                group=GROUP_NAMES.get(group.group_desc, group.group_desc.lower()),
                ranks=len(ranks),
                stride=ranks[1] - ranks[0],
                phase=self.clock.phase,
                pass_=self.clock.pass_,
                in_pass=self.in_pass,
            )
        )

    @contextmanager
    def watch_kept(self) -> Iterator[None]:
        """Note every tensor that autograd keeps, but not in a recompute inside a backward pass.

        Where hooks of the program's own take what is saved, only those that they give back: of the
        others `handed_over` is told.
        """

        def pack(tensor: Tensor) -> Tensor:
            if isinstance(tensor, Parameter):
                return tensor  # a weight, whose storage ZeRO 3 frees meanwhile
            storage = tensor.untyped_storage()
            if storage._cdata in self.gathered:
                return tensor  # a view of one
            if self._keeps():
                self._kept.note(storage)
            return tensor.detach()

        def enter(hooks: torch.autograd.graph.saved_tensors_hooks) -> None:
            def both(tensor: Tensor) -> Any:
                packed = hooks.pack_hook(tensor)
                return pack(packed) if isinstance(packed, Tensor) else packed

            torch._C._autograd._push_saved_tensors_default_hooks(both, hooks.unpack_hook)

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            Replaced(torch.autograd.graph.saved_tensors_hooks, "__enter__", enter),
            self.live.watching_sizes(self._kept.resized),
        ):
            yield

    def _keeps(self) -> bool:
        return self._records and torch._C._current_graph_task_id() == -1

    def handed_over(self, place: Any, tensor: Tensor | None) -> None:
        """Something else keeps a tensor for the backward pass, at `place`; None: no longer."""
        if tensor is None:
            self._handed.pop(place, None)
        elif self._keeps():
            storage = tensor.untyped_storage()
            self._handed[place] = storage._cdata, storage.nbytes()

    def kept(self) -> list[tuple[int, int]]:
        """(identity, bytes) of the storages kept; those of ended ones may serve again."""
        found = self._kept.found()
        known = {key for key, _ in found}
        handed = dict(self._handed.values())
        return found + [(key, size) for key, size in handed.items() if key not in known]


def _noting(recorder: Recorder, is_function: bool, again: bool) -> Callable[..., None]:
    return lambda *_gradients: recorder.saw_node(is_function, again)


def _nodes(tensors: Iterable[Tensor]) -> list[Any]:
    """Every node below some tensors, once; they stay alive, so that each is itself."""
    found: dict[Any, None] = {}
    ahead = [tensor.grad_fn for tensor in tensors]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found[node] = None
            ahead += [following for following, _ in node.next_functions]
    return list(found)


def held_bytes(held: Mapping[str, Iterable[Tensor]]) -> dict[str, dict[int, int]]:
    """{kind: {storage, by identity, as addresses of tensors without values are all 0: bytes}}; a
    storage that two kinds share belongs to the first.

    Args:
        held: by kind; of ledger.persistent_tensors.
    """
    seen: set[int] = set()
    found = {}
    for kind in (WEIGHTS, GRADIENTS, OPTIMIZER):
        storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in held.get(kind, ()))}
        # An empty one ends when ZeRO 3 gathers the parameter, and its identity serves again.
        found[kind] = {key: size for key, size in storages.items() if size and key not in seen}
        seen |= set(storages)
    return found


def stage_memory(
    held: Mapping[str, Mapping[int, int]],
    of_experts: Mapping[str, Mapping[int, int]],
    recorder: Recorder,
    standing: int = 0,
) -> StageMemory:
    """Bytes by kind; activations are neither weights nor the optimizer's. Of gradients the identity
    may serve again: DeepSpeed's end within the step.

    Args:
        held: from step to step, or from micro-batch to micro-batch; of `held_bytes`.
        of_experts: which of them are of routed experts; as `held`.
        recorder: of the step.
        standing: bytes of what is there in every pass, made before the step.
    """
    on_host = {key for found in held.values() for key in found if recorder.host.holds_storage(key)}
    sizes = {
        kind: sum(size for key, size in found.items() if key not in on_host)
        for kind, found in held.items()
    }
    for kind, found in held.items():
        here = (found.keys() & of_experts[kind].keys()) - on_host
        sizes[f"expert_{kind}"] = sum(found[key] for key in here)
    sizes["host_optimizer"] = sum(held[kind].get(key, 0) for kind in held for key in on_host)
    others = held[WEIGHTS].keys() | held[OPTIMIZER].keys()
    sizes["activations"] = sum(size for key, size in recorder.kept() if key not in others)
    live = recorder.live
    forward, backward, again = (
        max(0, live.peaks.get(one, 0) - live.base) + standing
        for one in (FORWARD, BACKWARD, RECOMPUTE)
    )
    return StageMemory(**sizes, forward_peak=forward, backward_peak=max(backward, again))


@cache  # of a few hundred operators, asked tens of thousands of times
def _is_in_place(func: Any) -> bool:
    """Whether an operator returns an argument that it wrote to."""
    return any(
        alias is not None and alias.is_write
        for alias in (v.alias_info for v in func._schema.returns)
    )


@cache
def _is_view(func: Any) -> bool:
    """Whether an operator returns its input seen otherwise, and writes nothing."""
    if func.overloadpacket is aten._unsafe_view:  # its schema says copy; it is none
        return True
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
