"""Experts' parameters -> the three weights of the kernels, and their gradients back.

Plain slices would give each of gate and up a zero-filled gradient as large as both and add the two;
here they are laid into the parameter's gradient once, or not at all where a backend makes the two
as halves of one tensor. Where Megatron accumulates gradients in its linears
(gradient_accumulation_fusion) they go straight into `main_grad`, under the rules of
LinearWithGradAccumulationAndAsyncCommunication.backward (megatron/core/tensor_parallel/layers.py):
a backend that finds `grad_sink` on a view adds to the tensor that it returns and gives no gradient
of its own; what others give is added here.
May touch: torch, the parameters' Megatron attributes.
Shapes: E experts, F neurons, H hidden, all of this rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter


def weight_views(linear_fc1: Any, linear_fc2: Any, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """w_gate, w_up and w_down, each a view [E, F, H].

    Args:
        linear_fc1: parameter [E, 2, F, H], gate and up vectors; `main_grad` is Megatron's.
        linear_fc2: parameter [E, F, H], down vectors.
        fused: add gradients to `main_grad` and leave `.grad` a placeholder.
    """
    gate, up, down = _WeightViews.apply(linear_fc1, linear_fc2, fused)
    if fused and gate.requires_grad:
        # asked for in the backward pass: a gradient buffer may be set or moved until then
        gate.grad_sink = lambda: linear_fc1.main_grad[:, 0]
        up.grad_sink = lambda: linear_fc1.main_grad[:, 1]
    if fused and down.requires_grad:
        down.grad_sink = lambda: linear_fc2.main_grad
    return gate, up, down


class _WeightViews(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fc1: Parameter, fc2: Parameter, fused: bool):
        ctx.parameters, ctx.fused = (fc1, fc2), fused
        ctx.set_materialize_grads(False)
        gate, up, down = fc1[:, 0], fc1[:, 1], fc2.view_as(fc2)
        frozen = [] if fc1.requires_grad else [gate, up]
        ctx.mark_non_differentiable(*frozen, *([] if fc2.requires_grad else [down]))
        return gate, up, down

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgate, dup, ddown):
        fc1, fc2 = ctx.parameters
        if not ctx.fused:
            return _side_by_side(fc1, dgate, dup), ddown, None
        for half, gradient in ((0, dgate), (1, dup)):
            if gradient is not None:
                fc1.main_grad[:, half].add_(gradient)
        if ddown is not None:
            fc2.main_grad.add_(ddown)
        return *(_placeholder(p) if p.requires_grad else None for p in (fc1, fc2)), None


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
