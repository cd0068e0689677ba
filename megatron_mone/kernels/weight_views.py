"""Experts' parameters -> the three weights of the kernels, and their gradients back.

Plain slices would give each of gate and up a zero-filled gradient as large as both and add the two;
here they are laid into the parameter's gradient once, or not at all where a backend makes the two
as halves of one tensor. Where Megatron accumulates gradients in its linears
(gradient_accumulation_fusion) they go straight into `main_grad`, under the rules of
LinearWithGradAccumulationAndAsyncCommunication.backward (megatron/core/tensor_parallel/layers.py):
a backend that finds `grad_sink` on a view adds to the tensor that it returns and gives no gradient
of its own; what others give is added here.
Where Megatron puts weight gradients off (delay_wgrad_compute,
overlap_dispatch_backward_with_experts_wgrad) a backward pass stops at the views, and `add_later`
lets the parameters' own nodes of autograd have the gradients: whoever waits for those there
(DDP's hooks, which reduce them) sees a gradient when it is made, and once.
May touch: torch, the parameters' Megatron attributes.
Shapes: E experts, F neurons, H hidden, all of this rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter


class Gradient(NamedTuple):
    """Where a weight gradient goes.

    Attributes:
        out_EFH: [E, F, H] with unit last stride.
        adds: to what `out_EFH` holds, instead of overwriting it.
    """

    out_EFH: Tensor
    adds: bool


Goal = Callable[[], Gradient]
"""Makes, when it is due, the place of a weight's gradient."""
Sink = Callable[[], Tensor]
"""Gives, when it is due, a tensor that a weight's gradient is added to."""


def weight_views(
    linear_fc1: Any, linear_fc2: Any, fused: bool, later: list | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """w_gate, w_up and w_down, each a view [E, F, H].

    Args:
        linear_fc1: parameter [E, 2, F, H], gate and up vectors; `main_grad` is Megatron's.
        linear_fc2: parameter [E, F, H], down vectors.
        fused: add gradients to `main_grad` and leave `.grad` a placeholder.
        later: where gradients wait for `add_later`. A backend that can puts there what makes them,
            and gives none; what others give waits there as it is.
    """
    given = linear_fc1, linear_fc2
    if later is not None:
        given = tuple(p.detach().requires_grad_(p.requires_grad) for p in given)
    gate, up, down = _WeightViews.apply(*given, fused, later)
    if fused and gate.requires_grad:
        # asked for in the backward pass: a gradient buffer may be set or moved until then
        gate.grad_sink = lambda: linear_fc1.main_grad[:, 0]
        up.grad_sink = lambda: linear_fc1.main_grad[:, 1]
    if fused and down.requires_grad:
        down.grad_sink = lambda: linear_fc2.main_grad
    if later is not None:
        gate.grad_later = later
    return gate, up, down


def kept_for_backward(*parameters: Parameter) -> AbstractContextManager[Any]:
    """What the kernels run in, so that autograd keeps no weights that are about to be freed.

    ZeRO 3 gathers a parameter's data for a pass and frees it afterwards. A saved parameter finds
    the data of its next pass; a saved view would hold the data of this one until then. So a view
    is kept as the place that it has in its parameter.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):  # DeepSpeed's mark
        return nullcontext()
    owners = {parameter.untyped_storage().data_ptr(): parameter for parameter in parameters}

    def pack(kept: Tensor) -> Tensor | tuple[Parameter, tuple, tuple, int]:
        owner = owners.get(kept.untyped_storage().data_ptr()) if kept.numel() else None
        if owner is None:
            return kept
        place = int(kept.storage_offset() - owner.storage_offset())
        return owner, tuple(kept.shape), kept.stride(), place

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        owner, shape, stride, place = packed
        return owner.detach().as_strided(shape, stride, owner.storage_offset() + place)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def sinks_of(weights: tuple[Tensor, Tensor, Tensor]) -> list[Sink | None]:
    """The tensors that the gradients of gate, up and down are added to, where there are any."""
    return [getattr(weight, "grad_sink", None) for weight in weights]


def gradient_goals(
    weights: tuple[Tensor, Tensor, Tensor],
    sinks: list[Sink | None],
    wanted: tuple[bool, ...],
    new: Callable[[tuple[int, ...], torch.dtype], Tensor],
) -> list[Goal | None]:
    """Of gate, up and down: a weight's sink, or a tensor of `new`; None where none is wanted."""
    goals = [
        _goal(weight, sink, new) if want else None
        for weight, sink, want in zip(weights, sinks, wanted, strict=True)
    ]
    if all(wanted[:2]) and sinks[:2] == [None, None] and halves_of_one(*weights[:2]):
        goals[:2] = _goals_of_halves(weights[0], new)
    return goals


def _goal(weight_EFH: Tensor, sink: Sink | None, new: Callable[..., Tensor]) -> Goal:
    if sink is not None:
        return lambda: Gradient(sink(), True)
    return lambda: Gradient(new(tuple(weight_EFH.shape), weight_EFH.dtype), False)


def _goals_of_halves(weight_EFH: Tensor, new: Callable[..., Tensor]) -> list[Goal | None]:
    """Gate's and up's gradients lie in one new tensor, as the weights do in theirs."""
    experts, neurons, hidden = weight_EFH.shape

    @cache
    def both() -> Tensor:
        return new((experts, 2, neurons, hidden), weight_EFH.dtype)

    return [lambda: Gradient(both()[:, 0], False), lambda: Gradient(both()[:, 1], False)]


def later_of(weights: tuple[Tensor, Tensor, Tensor]) -> list | None:
    """Where what makes the gradients of gate, up and down waits; None: they are made at once."""
    return getattr(weights[0], "grad_later", None)


@torch.no_grad()
def add_later(linear_fc1: Parameter, linear_fc2: Parameter, fused: bool, later: list) -> None:
    """Make the gradients that were put off, in their order, and end their backward passes.

    Args:
        linear_fc1, linear_fc2, fused: of `weight_views`.
        later: its list, an entry for each backward pass; empty afterwards. An entry gives the
            gradients of gate, up and down, None for one that it added to its sink.
    """
    waiting, later[:] = list(later), []
    parameters = linear_fc1, linear_fc2
    for make in waiting:
        gradients = _of_parameters(parameters, fused, make())
        made = [pair for pair in zip(parameters, gradients, strict=True) if pair[1] is not None]
        if made:
            torch.autograd.backward([p for p, _ in made], [gradient for _, gradient in made])


class _WeightViews(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fc1: Tensor, fc2: Tensor, fused: bool, later: list | None):
        ctx.parameters, ctx.fused, ctx.later = (fc1, fc2), fused, later
        ctx.set_materialize_grads(False)
        gate, up, down = fc1[:, 0], fc1[:, 1], fc2.view_as(fc2)
        frozen = [] if fc1.requires_grad else [gate, up]
        ctx.mark_non_differentiable(*frozen, *([] if fc2.requires_grad else [down]))
        return gate, up, down

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients):
        if ctx.later is None:
            return *_of_parameters(ctx.parameters, ctx.fused, gradients), None, None
        if any(gradient is not None for gradient in gradients):
            ctx.later.append(lambda: gradients)
        return None, None, None, None


def _of_parameters(
    parameters: tuple[Any, Any], fused: bool, gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """What autograd is to have for fc1 and fc2, after what goes to `main_grad` went there."""
    (fc1, fc2), (dgate, dup, ddown) = parameters, gradients
    if not fused:
        return _side_by_side(fc1, dgate, dup), ddown
    for half, gradient in ((0, dgate), (1, dup)):
        if gradient is not None:
            fc1.main_grad[:, half].add_(gradient)
    if ddown is not None:
        fc2.main_grad.add_(ddown)
    return tuple(_placeholder(p) if p.requires_grad else None for p in parameters)


def halves_of_one(first_EFH: Tensor, second_EFH: Tensor) -> bool:
    """Whether two tensors are [:, 0] and [:, 1] of one contiguous [E, 2, F, H]."""
    _, neurons, hidden = first_EFH.shape
    size = neurons * hidden
    return bool(
        first_EFH.shape == second_EFH.shape
        and first_EFH.untyped_storage().data_ptr() == second_EFH.untyped_storage().data_ptr()
        and second_EFH.storage_offset() - first_EFH.storage_offset() == size
        and first_EFH.stride() == second_EFH.stride() == (2 * size, hidden, 1)
    )


def _side_by_side(fc1: Parameter, dgate: Tensor | None, dup: Tensor | None) -> Tensor | None:
    """[E, 2, F, H]."""
    if not fc1.requires_grad or (dgate is None and dup is None):
        return None
    if dgate is not None and dup is not None and halves_of_one(dgate, dup):
        return dgate.as_strided(fc1.shape, fc1.stride())
    gradient = torch.empty_like(fc1)
    for half, part in ((0, dgate), (1, dup)):
        if part is None:
            gradient[:, half].zero_()
        else:
            gradient[:, half].copy_(part)
    return gradient


def _placeholder(parameter: Parameter) -> Tensor | None:
    """What DDP's hooks take for a gradient that `main_grad` already holds."""
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    zero = getattr(parameter, "zero_out_wgrad", False)
    return torch.zeros_like(parameter) if zero else torch.empty_like(parameter)
