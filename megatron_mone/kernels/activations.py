"""The gate activations sigma of MoNE, by name.

softmax runs over all F neurons of a row; when they are split over expert-tensor ranks its maximum
and sum are taken over the group. Everything else is elementwise.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


def squared_relu(a: Tensor) -> Tensor:
    """relu(a)^2 (So et al. 2021, arXiv 2109.08668), as Megatron's."""
    return F.relu(a).square()


_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": squared_relu,
}
ACTIVATIONS = (*_ELEMENTWISE, "softmax")


def gate_activation(name: str, a_NF: Tensor, etp_group: ProcessGroup | None = None) -> Tensor:
    """sigma(a).

    Args:
        name: one of ACTIVATIONS.
        a_NF: [N, F_l] gate pre-activations.
        etp_group: ranks that share the row's neurons; only softmax needs it.

    Raises:
        ValueError: unknown name.
    """
    if name in _ELEMENTWISE:
        return _ELEMENTWISE[name](a_NF)
    if name != "softmax":
        raise ValueError(f"activation = {name!r} is not one of {', '.join(ACTIVATIONS)}")
    if etp_group is None or etp_group.size() == 1:
        return torch.softmax(a_NF, dim=-1)
    top_N1 = a_NF.detach().amax(dim=-1, keepdim=True)
    torch.distributed.all_reduce(top_N1, op=torch.distributed.ReduceOp.MAX, group=etp_group)
    e_NF = torch.exp(a_NF - top_N1)
    return e_NF / sum_over_group(e_NF.sum(dim=-1, keepdim=True), etp_group)


class _SumOverGroup(torch.autograd.Function):
    """All-reduce forward and backward: each rank's loss depends on every rank's summand."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        total = grad.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of every rank's `x`, differentiable: the gradient is the sum of every rank's gradient."""
    if group is None or group.size() == 1:
        return x
    return _SumOverGroup.apply(x, group)
