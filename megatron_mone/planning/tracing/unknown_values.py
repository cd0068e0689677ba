"""A program's tensors without their values: everything floating has shapes alone.

Inside the mode a new floating tensor is on torch's `meta` device, so that weights are never
allocated, and integers and truth values stay real: routing maps, counts and splits, which Megatron
asks for to know shapes, are computed by its own code. What mixes both is unknown. May touch: what
runs while it is entered; no global state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mone.profiling.communication import tensors_in

aten = torch.ops.aten
META = torch.device("meta")

Observe = Callable[[Any, tuple, dict[str, Any], Any], None]
"""Told (operator, positional arguments, keywords, result) of everything that ran."""


class UnknownValues(TorchDispatchMode):
    """Context in which floating tensors have no values.

    Args:
        observe: told of every operator, on known and unknown tensors.
    """

    def __init__(self, observe: Observe) -> None:
        super().__init__()
        self._observe = observe

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator; torch calls it."""
        kwargs = dict(kwargs or {})
        tensors = list(tensors_in((args, kwargs)))
        if any(tensor.is_meta for tensor in tensors):
            result = _run_unknown(func, args, kwargs)
        else:
            if not tensors and _makes_floats(func, kwargs):
                kwargs["device"] = META
            result = func(*args, **kwargs)
        self._observe(func, args, kwargs, result)
        return result


def _makes_floats(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator without tensor arguments makes a floating tensor."""
    names = {argument.name for argument in func._schema.arguments}
    if "device" not in names or "dtype" not in names:
        return False
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    by_values = func.overloadpacket in (aten.arange, aten.full, aten.scalar_tensor)
    return dtype.is_floating_point and (kwargs.get("dtype") is not None or not by_values)


def _run_unknown(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operator with an unknown tensor among its arguments."""
    packet = func.overloadpacket
    if packet in _ANSWERS:
        return _ANSWERS[packet](*args, **kwargs)
    if packet is aten.index:
        args = (args[0], [_positions(index) for index in args[1]])
    if kwargs.get("device") is not None:
        kwargs["device"] = META
    meta_args, meta_kwargs = _without_values(args), _without_values(kwargs)
    result = func(*meta_args, **meta_kwargs)
    written = _written(func, args, kwargs)
    if written is not None and isinstance(result, Tensor):
        return written  # a known tensor that is written to keeps its old values
    return result


def _without_values(tree: Any) -> Any:
    """Nested lists, tuples and dictionaries with all tensors on `meta`."""
    if isinstance(tree, Tensor):
        return tree if tree.is_meta else tree.to(META)
    if isinstance(tree, dict):
        return {key: _without_values(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_without_values(value) for value in tree])
    return tree


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The argument that an in-place operator writes to and returns."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[place] if place < len(args) else kwargs[argument.name]
    return None


def _positions(index: Tensor | None) -> Tensor | None:
    """A truth mask of one dimension as positions, whose number is a shape."""
    if index is None or index.is_meta or index.dtype != torch.bool or index.dim() != 1:
        return index
    return index.nonzero().flatten()


def _masked_select(values: Tensor, mask: Tensor) -> Tensor:
    if mask.is_meta:
        raise RuntimeError("masked_select by a mask whose values are not known has no known shape")
    return torch.empty(int(mask.sum()), dtype=values.dtype, device=META)


def _bincount(values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return torch.empty(minlength, dtype=torch.int64, device=META)


def _scalar(value: Tensor) -> bool | float:
    """What Python reads off an unknown tensor: no fault was found, and a norm or loss is 1.

    DeepSpeed keeps its fault in a byte.
    """
    if value.dtype in (torch.bool, torch.uint8):
        return False
    if value.dtype.is_floating_point:
        return 1.0
    raise RuntimeError("an integer whose value is not known was asked for")


_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten.masked_select: _masked_select,
    aten.bincount: _bincount,
    aten._local_scalar_dense: _scalar,
    aten.equal: lambda first, second: True,
}
