"""The tensors that DeepSpeed's engine holds beside the model's own and the plain optimizer's.

Walked, not named: whatever its optimizer can reach and that is neither a weight nor state is a
gradient, or a buffer in which gradients add up or travel. Touches nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

_SHAPES = "round_robin_bit16_meta"  # tensors without values


def held(engine: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(weights, gradients, optimizer) of a DeepSpeedEngine at this moment; views and repeats too.

    Weights are the pieces of ZeRO 3, beside parameters; of the optimizer what its own param_groups
    and state do not hold as values: ZeRO 3's float32 pieces, and single numbers.
    """
    optimizer, basic = engine.optimizer, engine.basic_optimizer
    parameters = list(engine.module.parameters())
    weights = [one.ds_tensor for one in parameters if hasattr(one, "ds_tensor")]
    state = [*getattr(optimizer, "fp32_partitioned_groups_flat", ()), *basic.state]
    known = _storages([*parameters, *weights, *state, *_reach([basic.param_groups, basic.state])])
    if optimizer is basic:
        return weights, [], state
    own = vars(optimizer).items()
    accumulated = [getattr(one, "grad_accum", None) for one in parameters]
    rest = [
        one for one in _reach([*(value for name, value in own if name != _SHAPES), *accumulated])
        if one.untyped_storage()._cdata not in known
    ]  # fmt: skip
    return (
        weights, [one for one in rest if one.numel() > 1],
        state + [one for one in rest if one.numel() <= 1],
    )  # fmt: skip


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {one.untyped_storage()._cdata for one in tensors}


def _reach(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors in lists, dictionaries and the buckets that DeepSpeed has as dataclasses."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _reach(value)
        elif isinstance(value, dict):
            yield from _reach(value.values())
        elif is_dataclass(value):
            yield from _reach(vars(value).values())
