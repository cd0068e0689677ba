"""Recorder: notes operators, collectives and tensors kept for backward, as they happen.

`LiveBytes` counts what the tensors of a program hold at once: every storage once, from the operator
that made it until Python lets go of it. Autograd under a dispatch mode adds gradients out of place,
so that a backward pass shows slightly more than it needs without.
May touch: a PhaseClock, which it asks for the phase and pass under way; torch's FLOP formulas;
`torch.UntypedStorage.resize_`, while entered.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.common.phases import BACKWARD, FORWARD, RECOMPUTE
from megatron_mone.common.phases import OPTIMIZER as OPTIMIZER_PHASE
from megatron_mone.planning.tracing.trace import Collective, Op, StageMemory
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
    """

    def __init__(self, pass_of: Callable[[], str]) -> None:
        self._pass_of = pass_of
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

    @contextmanager
    def watching_sizes(self) -> Iterator[None]:
        """While it lasts, a storage that is resized (freed under its tensor) counts as it is."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, *size: Any) -> Any:
            result = resize(storage, *size)
            if storage._cdata in self._sizes:
                self._change(storage._cdata, storage.nbytes())
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


aten = torch.ops.aten

# New storage that nothing is written to.
_UNWRITTEN = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
              aten.new_empty_strided, aten.empty_permuted)  # fmt: skip
# What reads of its first input the entries that another one names.
_PICKING = (aten.embedding, aten.index, aten.index_select, aten.gather, aten.masked_select)


class Recorder:
    """Notes what happens while its clock runs.

    Attributes:
        clock: of the phases.
        ops, collectives: in order, not merged.
        live: bytes of what the step makes; its passes are those of the clock, and the optimizer.
    """

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock
        self.ops: list[Op] = []
        self.collectives: list[Collective] = []
        self._formulas = FlopCounter().flop_registry
        self._kept: dict[int, torch.UntypedStorage] = {}
        self.live = LiveBytes(self._pass)

    def _pass(self) -> str:
        return OPTIMIZER_PHASE if self.clock.phase == OPTIMIZER_PHASE else self.clock.pass_

    def saw_operator(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """An operator ran; views and unwritten memory are no work."""
        if not self.clock.running:
            return
        inputs, outputs = list(tensors_in((args, kwargs))), list(tensors_in((result,)))
        if not outputs or _is_view(func):
            return
        if not _is_in_place(func):
            for output in outputs:
                self.live.note(output)
        if func.overloadpacket in _UNWRITTEN:
            return
        formula = self._formulas.get(func.overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        read = None
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
        if not self.clock.running:
            return
        inputs, outputs = list(inputs), list(outputs)
        kind = outputs[0].dtype if dtype is None else dtype
        self.ops.append(
            Op(
                name=name,
                inputs=tuple(tuple(tensor.shape) for tensor in inputs),
                outputs=tuple(tuple(tensor.shape) for tensor in outputs),
                dtype=str(kind).removeprefix("torch."),
                bytes_read=sum(tensor.nbytes for tensor in inputs) if read is None else read,
                bytes_written=sum(tensor.nbytes for tensor in outputs),
                flops=flops,
                phase=self.clock.phase if phase is None else phase,
                pass_=self.clock.pass_,
            )
        )

    def saw_collective(self, kind: str, size: int, group: dist.ProcessGroup) -> None:
        """A collective of more than one rank was launched."""
        if not self.clock.running:
            return
        ranks = dist.get_process_group_ranks(group)
        self.collectives.append(
            Collective(
                kind=kind,
                bytes=size,
                group=GROUP_NAMES.get(group.group_desc, group.group_desc.lower()),
                ranks=len(ranks),
                stride=ranks[1] - ranks[0],
                phase=self.clock.phase,
                pass_=self.clock.pass_,
            )
        )

    @contextmanager
    def watch_kept(self) -> Iterator[None]:
        """Note every tensor that autograd keeps, but not in a recompute inside a backward pass."""

        def pack(tensor: Tensor) -> Tensor:
            if torch._C._current_graph_task_id() == -1:
                storage = tensor.untyped_storage()
                self._kept[storage._cdata] = storage
            return tensor.detach()

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            self.live.watching_sizes(),
        ):
            yield

    def kept(self) -> dict[int, torch.UntypedStorage]:
        """The storages kept, by identity."""
        return dict(self._kept)


def stage_memory(
    held: Mapping[str, Iterable[Tensor]],
    of_experts: Mapping[str, Iterable[Tensor]],
    recorder: Recorder,
) -> StageMemory:
    """Bytes by kind; a storage that two kinds share belongs to the first.

    Args:
        held: from step to step, by kind; of ledger.persistent_tensors.
        of_experts: which of them are of routed experts; as `held`.
        recorder: of the step.
    """
    found = {kind: _storages(held[kind]) for kind in (WEIGHTS, GRADIENTS, OPTIMIZER)}
    found["activations"] = recorder.kept()
    seen: set[int] = set()
    sizes = {}
    for kind, storages in found.items():
        own = {key: s for key, s in storages.items() if key not in seen}
        sizes[kind] = sum(s.nbytes() for s in own.values())
        if kind in of_experts:
            experts = own.keys() & _storages(of_experts[kind]).keys()
            sizes[f"expert_{kind}"] = sum(own[key].nbytes() for key in experts)
        seen |= set(storages)
    peaks = recorder.live.peaks
    return StageMemory(
        **sizes,
        forward_peak=peaks.get(FORWARD, 0),
        backward_peak=max(peaks.get(BACKWARD, 0), peaks.get(RECOMPUTE, 0)),
    )


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """By identity: addresses of tensors without values are all 0."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in found}


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
