"""The local norm, with the two settings that Megatron's wrapper of torch's norm refuses."""

from __future__ import annotations

import copy
from typing import Any

from megatron_mone.common.patch import Patch, in_source


def _apply() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(
        cls: type, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any
    ) -> Any:
        plain = copy.copy(config)
        # A persistent kernel is a choice of GPU code, the same function.
        plain.persist_layer_norm = False
        plain.sequence_parallel = False
        norm: Any = original(cls, plain, hidden_size, eps, *args, **kwargs)
        for parameter in norm.parameters():
            # Read by finalize_model_grads, which sums these gradients over the TP group: every
            # rank normalises its own part of the sequence with the same weight.
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new


PATCHES = (
    Patch(
        name="sequence-parallel-norm",
        needed_by="megatron/core/transformer/torch_norm.py: WrappedTorchNorm.__new__",
        why="the only norm without Apex or Transformer Engine refuses sequence parallel, which "
        "MoE with tensor parallelism requires, and the default persist_layer_norm",
        apply=_apply,
        still_needed=in_source(
            "core/transformer/torch_norm.py", "sequence parallel not supported by torch LayerNorm"
        ),
    ),
)
