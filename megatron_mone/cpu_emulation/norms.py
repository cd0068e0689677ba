"""The local norm, with the settings that Megatron's wrapper of torch's norm refuses or lacks."""

import copy
from collections.abc import Callable
from typing import Any

from megatron_mone.common.patch import wrapping


def _allowing(original: Callable[..., Any]) -> Callable[..., Any]:
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
        if config.fp32_residual_connection:
            # Of a residual stream in float32 too, the linears behind it get their own type, as from
            # Transformer Engine's norms.
            norm.register_forward_hook(lambda module, given, made: made.to(config.params_dtype))
        return norm

    return new


PATCHES = (
    wrapping(
        "sequence-parallel-norm",
        "megatron.core.transformer.torch_norm: WrappedTorchNorm.__new__",
        _allowing,
        why="the only norm without Apex or Transformer Engine refuses sequence parallel, which "
        "MoE with tensor parallelism requires, and the default persist_layer_norm",
        needed_while="sequence parallel not supported by torch LayerNorm",
    ),
)
