"""The buffers in which Megatron FSDP holds a model's weights, gradients and main weights.

Whole weights are gathered into buckets of memory that comes and goes under the parameters; what of
them is there belongs to the weights. Touches nothing.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

_WEIGHTS = ("model_weight_buffer", "transpose_weight_buffer", "hfsdp_helper_wbuf",
            "hfsdp_helper_wtbuf")  # fmt: skip
_GRADIENTS = ("main_grad_buffer", "hfsdp_helper_gbuf")


def held(
    chunk: Any, *, of_experts: bool = False
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(weights, gradients, main weights) of a model chunk at this moment, buckets among them; none
    where Megatron FSDP does not hold it.

    Args:
        chunk: of the model, as Megatron wrapped it.
        of_experts: what is of experts that expert parallelism shards, alone; of gradients nothing,
            for those of a type lie in one memory.
    """
    groups = [
        group
        for group in getattr(getattr(chunk, "param_and_grad_buffer", None), "parameter_groups", ())
        if not of_experts or all(not getattr(p, "allreduce", True) for p in group.params)
    ]
    return (
        [one for group in groups for one in _of(group, _WEIGHTS)],
        [one for group in groups if not of_experts for one in _of(group, _GRADIENTS)],
        [one for group in groups for one in _of(group, ("main_weight_buffer",))],
    )


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that is cut over ranks."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _of(group: Any, names: tuple[str, ...]) -> Iterator[Tensor]:
    for name in names:
        buffer = getattr(group, name, None)
        if buffer is None:
            continue
        if getattr(buffer, "data", None) is not None:
            yield buffer.data
        bucket = buffer.temporary_bucket_allocator.buckets.get(buffer.bucket_id)
        if bucket is not None:
            yield bucket.data
