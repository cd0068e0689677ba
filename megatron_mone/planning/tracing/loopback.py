"""Process groups of a job of W ranks in one process: every peer is a copy of this rank.

torch's fake backend makes the groups; the methods of ProcessGroup by which every collective goes
are replaced by their meaning among copies: an all-gather returns this rank's input once for each
peer, a sum is the input times the peers, and a message that arrives has the shape it was asked for.
Only tensors with values are written (`unknown_values.py`): on the others a collective has no effect
beyond being seen. May touch: torch.distributed's new_group and ProcessGroup, undone whole.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mone.profiling.communication import METHODS, tensors_in

Observe = Callable[[str, int, dist.ProcessGroup], None]
"""Told (kind, bytes this rank puts in, group) of a collective; kinds as in `communication`."""


class Done(dist._Work):
    """The handle of a collective that has finished."""

    def wait(self, timeout: Any = None) -> bool:
        """True at once."""
        return True

    def is_completed(self) -> bool:
        """True."""
        return True


class Loopback:
    """Replaces collectives from `start` to `stop`.

    Args:
        observe: told of every collective of more than one rank.
    """

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._undo: list[Callable[[], None]] = []

    def start(self) -> None:
        """Replace them; to be called before process groups are made."""
        for method, (kind, position) in METHODS.items():
            if hasattr(dist.ProcessGroup, method):
                self._set(dist.ProcessGroup, method, self._stand_in(kind, position))
        # Blocks of collectives that a backend would launch together: here each is launched.
        for method in ("_start_coalescing", "_end_coalescing"):
            self._set(dist.ProcessGroup, method, lambda group, *args: Done())
        backend = dist.ProcessGroup._get_backend  # has none for tensors without values
        cpu = torch.device("cpu")
        self._set(dist.ProcessGroup, "_get_backend", lambda group, device: backend(group, cpu))
        self._set(dist, "new_group", _members_only(dist.new_group))

    def stop(self) -> None:
        """Put back what was there."""
        while self._undo:
            self._undo.pop()()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        own = vars(owner).get(name)
        setattr(owner, name, value)
        self._undo.append(
            lambda: delattr(owner, name) if own is None else setattr(owner, name, own)
        )

    def _stand_in(self, kind: str, position: int) -> Callable[..., Done]:
        effect = _EFFECTS.get(kind)

        def collective(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Done:
            if group.size() > 1:
                size = sum(t.nbytes for t in tensors_in(args[position : position + 1]))
                self._observe(kind, size, group)
            if effect is not None:
                effect(group, args)
            return Done()

        return collective


def _members_only(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """`new_group` that makes none for other ranks: a job of 16,384 has ten thousands of groups."""

    def made_here(ranks: Sequence[int] | None = None, *_args: Any, **kwargs: Any) -> Any:
        if ranks is not None and dist.get_rank() not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        # Whatever backend a real job asks for: timeouts and options are of no use here.
        return new_group(ranks, group_desc=kwargs.get("group_desc"))

    return made_here


def _all_reduce(group: dist.ProcessGroup, args: tuple) -> None:
    options = args[1] if len(args) > 1 else None
    if options is None or options.reduceOp == dist.ReduceOp.SUM:
        for tensor in _known(args[0]):
            tensor.mul_(group.size())


def _all_gather(group: dist.ProcessGroup, args: tuple) -> None:
    for output, value in _pairs(args[0], args[1]):
        if isinstance(output, Tensor):
            _fill(output.view(group.size(), -1), value.reshape(1, -1))
        else:
            for copy in output:
                _fill(copy, value)


def _reduce_scatter(group: dist.ProcessGroup, args: tuple) -> None:
    for output, value in _pairs(args[0], args[1]):
        if output.is_meta:
            continue  # a product here would be seen as the program's own
        if isinstance(value, Tensor):
            part = value.reshape(group.size(), -1)[group.rank()].view_as(output)
        else:
            part = value[group.rank()]
        _fill(output, part * group.size())


def _all_to_all(group: dist.ProcessGroup, args: tuple) -> None:
    """A copy sends to this rank what this rank sends to itself."""
    output, value = args[0], args[1]
    if isinstance(output, Tensor):
        splits = list(args[3]) if len(args) > 3 and len(args[3]) else None
        own = value.split(splits or value.shape[0] // group.size())[group.rank()]
        if not value.is_meta:
            _fill(output, own.repeat(group.size(), *[1] * (own.dim() - 1))[: output.shape[0]])
        return
    for copy in output:
        _fill(copy, value[group.rank()])


_EFFECTS: dict[str, Callable[[dist.ProcessGroup, tuple], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}


def _pairs(outputs: Any, inputs: Any) -> list[tuple[Any, Any]]:
    """Outputs with their inputs, of one collective or of several launched as one."""
    if isinstance(inputs, Tensor):
        return [(outputs, inputs)]
    if isinstance(outputs, Tensor):
        return [(outputs, inputs)]
    return list(zip(outputs, inputs, strict=True))


def _known(tensors: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in([tensors]) if not tensor.is_meta]


def _fill(output: Tensor, value: Tensor) -> None:
    """Copy where values are known; a place with values for one without would be read as it is."""
    if output.is_meta:
        return
    if value.is_meta:
        raise RuntimeError(
            f"a collective brings values that are not known, {output.dtype} of shape "
            f"{tuple(output.shape)}, into a tensor whose values are read"
        )
    with torch.no_grad():
        output.copy_(value)
