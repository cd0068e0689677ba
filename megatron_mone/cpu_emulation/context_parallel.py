"""Megatron's zigzag split of a sequence over context-parallel ranks, gathered again.

The sequence is cut into 2 * CP chunks and rank i holds chunks i and 2 * CP - 1 - i
(`get_batch_on_this_cp_rank`), which balances causal attention.
"""

from typing import Any

import torch
import torch.distributed as dist


def zigzag_positions(length: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the positions in a sequence of `length` that a rank holds, in its order, [s] int64.

    Raises ValueError unless `length` is a multiple of 2 * cp_size.
    """
    if length % (2 * cp_size):
        raise ValueError(
            f"sequence length {length} is not a multiple of 2 * context_parallel_size = "
            f"{2 * cp_size}"
        )
    chunks = torch.arange(length).view(2 * cp_size, -1)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def causal_mask(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Mask the keys after each query: query positions [s] -> [1, 1, s, length], True = hidden."""
    return (torch.arange(length)[None, :] > positions[:, None])[None, None]


class _AllGather(torch.autograd.Function):
    """All-gather along dim 0 in rank order; the gradient is summed over ranks and cut."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        gathered = local.new_empty((group.size() * local.size(0), *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        local = gradient.new_empty((gradient.size(0) // ctx.group.size(), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(local, gradient.contiguous(), group=ctx.group)
        return local, None


def gather_sequence(local: torch.Tensor, group: Any) -> torch.Tensor:
    """Gather zigzag parts [s, ...] over `group` into the sequence in true order, [s * CP, ...].

    Differentiable: every rank's use of a position adds to the gradient of the rank holding it.
    """
    size = group.size()
    gathered = _AllGather.apply(local, group)
    held = torch.cat([zigzag_positions(gathered.size(0), size, rank) for rank in range(size)])
    return gathered.index_select(0, torch.argsort(held))
