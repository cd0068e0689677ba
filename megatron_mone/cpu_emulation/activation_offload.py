"""Fine-grained activation offloading, which asks for CUDA tensors and Transformer Engine.

On CPU ranks what is offloaded is copied within the host's memory, into what stands for it, and
back: the manager, its groups and their order are Megatron's. Streams and events are those of
`cuda_calls.py`.
"""

from types import SimpleNamespace
from typing import Any

import torch

from megatron_mone.common.patch import Patch, in_source, wrapping
from megatron_mone.cpu_emulation.weight_gradients import hiding


def _manages(tensor: Any) -> bool:
    """Stand in for ChunkOffloadHandler._can_manage_tensor_for_offload: of every device."""
    return not isinstance(tensor, torch.nn.Parameter)


def _apply_switch() -> None:
    from megatron.core.extensions import transformer_engine

    transformer_engine.cpu_offload = SimpleNamespace(CPUOffloadEnabled=False)


def _has_switch() -> bool:
    from megatron.core.extensions import transformer_engine

    return getattr(transformer_engine, "cpu_offload", None) is not None


_MODULE = "megatron.core.pipeline_parallel.fine_grained_activation_offload"
_SOURCE = "core/pipeline_parallel/fine_grained_activation_offload.py"

PATCHES = (
    wrapping(
        "offloaded-devices",
        f"{_MODULE}: ChunkOffloadHandler._can_manage_tensor_for_offload",
        lambda stock: staticmethod(_manages),
        why="it takes tensors of CUDA devices alone",
        needed_while='tensor.device.type == "cuda"',
    ),
    Patch(
        name="offload-switch",
        needed_by="megatron/core/pipeline_parallel/fine_grained_activation_offload.py: "
        "TE CPU offload is not available",
        why="it sets a switch of Transformer Engine's module cpu_offload, which nobody reads here",
        apply=_apply_switch,
        still_needed=lambda: (
            not _has_switch() and in_source(_SOURCE, "TE CPU offload is not available")()
        ),
    ),
    wrapping(
        "offload-flag",
        "megatron.training.arguments: validate_args",
        hiding("fine_grained_activation_offloading"),
        why="fine_grained_activation_offloading asserts transformer_impl = transformer_engine",
        needed_while="Fine-grained activation offloading is only supported with transformer_engine",
    ),
    wrapping(
        "offload-affinity",
        "megatron.core.pipeline_parallel.utils: set_ideal_affinity_for_current_gpu",
        lambda stock: lambda: None,
        why="binds the process to the cores that are near its GPU",
        needed_while="Please install cuda-python to enable GPU affinity setting",
    ),
)
