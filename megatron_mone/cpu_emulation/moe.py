"""The token dispatcher's host copies."""

import functools
from typing import Any

import torch

from megatron_mone.common.patch import Patch, megatron_source, rebind


def _apply() -> None:
    from megatron.core.transformer.moe import moe_utils

    original = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        moved = original(tensor, as_numpy, record_stream)
        if as_numpy and torch.is_tensor(moved):
            return moved.numpy()
        return moved

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    rebind(original, maybe_move_tensor_to_cpu)


def _leaves_cpu_tensors() -> bool:
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    return torch.is_tensor(maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True))


PATCHES = (
    Patch(
        name="splits-as-numpy",
        needed_by="megatron/core/transformer/moe/moe_utils.py: maybe_move_tensor_to_cpu",
        why="a tensor that is on the CPU already comes back as a tensor; the all-to-all refuses "
        "its splits unless they are numpy",
        apply=_apply,
        still_needed=lambda: (
            "as_numpy" in megatron_source("core/transformer/moe/moe_utils.py")
            and _leaves_cpu_tensors()
        ),
    ),
)
