"""Weights that are fp8 alone (`--fp8-param-gather`), as Transformer Engine's quantized tensors.

A parameter of the model's dtype whose own storage is empty: its values are the copy by rows, 1 byte
an element, which Megatron moves into its parameter buffer and gathers, and the copy by columns,
made from it after the gather. Both, and their scales, are buffers of the layer. May touch: the
layers that own such weights.

Sources: transformer_engine/pytorch/quantized_tensor.py, tensor/utils.py;
megatron/core/fp8_utils.py.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.planning.tracing.stand_ins.fp8 import (
    FP8,
    FP8GlobalStateManager,
    MXFP8BlockScaling,
    Quantized,
    empty_copy,
)
from megatron_mone.planning.tracing.stand_ins.op import note_flat


class QuantizedTensor(Tensor):
    """A weight kept in fp8 alone.

    Attributes:
        owner, place: the layer, weakly, and the parameter's name in it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    owner: Any
    place: str

    def detach(self) -> Any:
        """The same weight, as Parameter takes it."""
        found = super().detach().as_subclass(type(self))
        vars(found).update(vars(self))
        return found

    def copies(self) -> tuple[Quantized, Quantized]:
        """(by rows, by columns)."""
        tensors = [getattr(self.owner(), f"{self.place}_{part}") for part in PARTS]
        return Quantized(*tensors[:2]), Quantized(*tensors[2:])

    def replace_rows(self, data: Tensor) -> None:
        """Move the values by rows to `data`, of as many elements."""
        setattr(self.owner(), f"{self.place}_{PARTS[0]}", data)


class MXFP8Tensor(QuantizedTensor):
    """One in mxfp8, whose two copies have scales of their own."""


PARTS = ("fp8_rows", "fp8_rows_scale", "fp8_columns", "fp8_columns_scale")


def parameter(owner: torch.nn.Module, name: str, weight: Tensor) -> torch.nn.Parameter:
    """A layer's weight: `weight`, or in fp8 alone where the layer is built so (`fp8_model_init`).

    Args:
        owner: the layer; gets the copies as buffers.
        name: of the parameter in it.
        weight: [N, K] without values.
    """
    recipe = FP8GlobalStateManager.initialising
    if recipe is None:
        return torch.nn.Parameter(weight)
    copies = (empty_copy(weight, recipe, True), empty_copy(weight, recipe, True))
    weight.untyped_storage().resize_(0)
    kind = MXFP8Tensor if isinstance(recipe, MXFP8BlockScaling) else QuantizedTensor
    quantized = weight.as_subclass(kind)
    quantized.owner, quantized.place = weakref.ref(owner), name
    for part, tensor in zip(PARTS, (t for copy in copies for t in copy.tensors()), strict=True):
        # As bytes: `Module.bfloat16` would make 16 bits of what it takes for floats.
        owner.register_buffer(f"{name}_{part}", tensor.view(torch.uint8), persistent=False)
    return torch.nn.Parameter(quantized)


def replace_raw_data(weight: QuantizedTensor, data: Tensor) -> None:
    """transformer_engine.pytorch.tensor.utils.replace_raw_data."""
    weight.replace_rows(data)


def cast_master_weights_to_fp8(
    weights: Sequence[QuantizedTensor], masters: Sequence[Tensor | None], _offsets: Any, group: Any,
    *_shards: Any, **_settings: Any,
) -> None:  # fmt: skip
    """transformer_engine.pytorch.tensor.utils.cast_master_weights_to_fp8.

    "fused.cast_fp8" of this rank's shards, after the ranks agreed on the largest values: one
    all-reduce of a number for each scale (mxfp8 scales need no other rank).

    Args:
        weights: all of a buffer.
        masters: this rank's fp32 shards of them, None where it has none.
        group: over which they are sharded.
    """
    shared = [weight for weight in weights if not isinstance(weight, MXFP8Tensor)]
    if shared:
        scales = sum(weight.copies()[0].scale.nbytes for weight in shared) // 4  # fp32
        largest = torch.empty(scales, dtype=torch.float32, device="meta")
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    held = [master for master in masters if master is not None]
    elements = sum(master.numel() for master in held)
    if elements:
        note_flat("fused.cast_fp8", elements, sum(master.nbytes for master in held), elements, FP8)


def post_all_gather_processing(weights: Sequence[QuantizedTensor]) -> None:
    """transformer_engine.pytorch.tensor.utils.post_all_gather_processing: columns from rows."""
    elements = sum(weight.numel() for weight in weights)
    note_flat("fused.transpose_fp8", elements, elements, elements, FP8)


@contextmanager
def buffers_without_values() -> Iterator[None]:
    """While it lasts Megatron's parameter buffers of bytes have no values, like those of floats."""
    from megatron.core.distributed import param_and_grad_buffer

    zeros = torch.zeros

    def no_bytes(*shape: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8:
            options["device"] = "meta"
        return zeros(*shape, **options)

    buffer = param_and_grad_buffer._ParamAndGradBuffer
    build = buffer.__init__

    def built(self: Any, *args: Any, **options: Any) -> None:
        with Replaced(torch, "zeros", no_bytes):
            build(self, *args, **options)

    with Replaced(buffer, "__init__", built):
        yield
