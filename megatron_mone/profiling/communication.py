"""Makes the collectives of a process say when they run, over which group, and how much they send.

Every collective of torch.distributed ends in a method of ProcessGroup and, where it waits, in
Work.wait; both are wrapped, so that callers which kept an older reference to a function are seen
too. Not seen: functional collectives (torch.ops._c10d_functional) and libraries with their own
transport (DeepEP), whose phases still are. May touch: those classes, undone whole.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_mone.common import phases
from megatron_mone.common.patch import Replaced
from megatron_mone.profiling.clock import Call, PhaseClock

# Megatron's group descriptions (parallel_state.initialize_model_parallel) in the layout's words.
GROUP_NAMES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    **{f"HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L{level}": "cp" for level in range(2)},
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp-cp",
    "MODEL_PARALLEL_GROUP": "mp",
    "EMBEDDING_GROUP": "embedding",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp-cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp-ep",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "tp-ep-pp",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": "tp-ep-pp",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
    "default_pg": "world",
}

# Method -> (name, position of the inputs among its arguments). Names changed with torch 2.14.
METHODS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "allgather": ("all_gather", 1),
    "allgather_coalesced": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
    "allgather_into_tensor_coalesced": ("all_gather", 1),
    "all_gather_single_coalesced": ("all_gather", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "gather": ("gather", 1),
    "scatter": ("scatter", 1),
    "send": ("send", 0),
    "recv": ("recv", 0),
    "barrier": ("barrier", 0),
}


def sent_bytes(operation: str, size: int, ranks: int) -> float:
    """Bytes one rank sends in a collective, by the algorithm that sends least.

    Args:
        operation: as in the second column of `METHODS`.
        size: bytes of this rank's inputs.
        ranks: in the group.
    """
    others = (ranks - 1) / ranks
    if operation == "all_reduce":
        return 2.0 * others * size
    if operation == "all_gather":
        return float((ranks - 1) * size)
    if operation in ("reduce_scatter", "all_to_all", "scatter"):
        return others * size
    return 0.0 if operation in ("recv", "barrier") else float(size)


def phase_of(current: str, group: str) -> str:
    """The phase of a collective that is called in phase `current`."""
    if group == "pp":
        return phases.PIPELINE_BUBBLE
    if current == phases.PERMUTE or (current, group) == (phases.ROUTER, "ep"):
        return phases.DISPATCH
    return current if current in phases.COMMUNICATION else phases.EXPOSED_COMMUNICATION


def watch_communication(clock: PhaseClock) -> Callable[[], None]:
    """Let every collective of this process tell `clock`; returns what undoes it."""
    launched: dict[int, Call] = {}  # id of the Work: what it does
    stack = ExitStack()
    for method in filter(partial(hasattr, dist.ProcessGroup), METHODS):
        launch = _launching(clock, launched, method)
        stack.enter_context(Replaced(dist.ProcessGroup, method, launch))
    stack.enter_context(Replaced(dist.Work, "wait", _waiting(clock, launched)))
    return stack.close


def _launching(clock: PhaseClock, launched: dict[int, Call], method: str) -> Callable:
    operation, position = METHODS[method]
    original = getattr(dist.ProcessGroup, method)

    def launch(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        if not clock.running or group.size() == 1:
            return original(group, *args, **kwargs)
        name = GROUP_NAMES.get(group.group_desc, group.group_desc.lower())
        size = sum(t.nbytes for t in tensors_in(args[position : position + 1]))
        before = clock.phase, clock.pass_
        start = clock.switch(phase_of(clock.phase, name), clock.pass_)
        try:
            work = original(group, *args, **kwargs)
        finally:
            end = clock.switch(*before)
        call = Call(operation, name, size, before[0])
        sent = round(sent_bytes(operation, size, group.size()))
        clock.note_communication(call, 1, sent, start, end)
        launched[id(work)] = call
        return work

    return launch


def _waiting(clock: PhaseClock, launched: dict[int, Call]) -> Callable:
    original = dist.Work.wait

    def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        known = launched.pop(id(work), None)
        if not clock.running or known is None:
            return original(work, *args, **kwargs)
        before = clock.phase, clock.pass_
        start = clock.switch(phase_of(clock.phase, known.group), clock.pass_)
        try:
            return original(work, *args, **kwargs)
        finally:
            clock.note_communication(known, 0, 0, start, clock.switch(*before))

    return wait


def tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among the values and in their lists, tuples and dictionaries, at any depth.

    A trace asks for every operator, of tens of thousands: torch's own trees take longer.
    """
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
