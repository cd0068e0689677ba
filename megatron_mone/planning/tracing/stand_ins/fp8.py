"""fp8 as Transformer Engine's layers use it: recipes, the context they run in, quantized copies.

A copy holds 1 byte an element and its scales. May touch: the state of the fp8 context of this
process.

Sources: transformer_engine/common/recipe, transformer_engine/pytorch/fp8.py and tensor/*.py.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.common.phases import OPTIMIZER
from megatron_mone.planning.tracing.stand_ins.op import note

FP8 = torch.float8_e4m3fn


class Format(Enum):
    """Which fp8 formats a recipe multiplies in; of the same width."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """How tensors are scaled to fp8. Keywords are those of Transformer Engine's recipes; none
    changes a shape."""

    def __init__(self, **_settings: Any) -> None:
        pass

    def scales(self, rows: int, columns: int, is_weight: bool) -> tuple[int, torch.dtype]:
        """(number, dtype) of the scales of a [rows, columns] copy: one of a tensor."""
        del rows, columns, is_weight
        return 1, torch.float32

    fuses_norm = False
    """Whether the norm before a linear writes fp8 itself."""


class DelayedScaling(Recipe):
    """One scale a tensor, from the largest values of past steps."""

    fuses_norm = True


class Float8CurrentScaling(Recipe):
    """One scale a tensor, from the tensor's own largest value."""


class Float8BlockScaling(Recipe):
    """fp32 scales of 1 x 128 elements of an activation, of 128 x 128 of a weight."""

    def scales(self, rows: int, columns: int, is_weight: bool) -> tuple[int, torch.dtype]:
        """See Recipe."""
        return -(-rows // (128 if is_weight else 1)) * -(-columns // 128), torch.float32


class MXFP8BlockScaling(Recipe):
    """8-bit scales of 1 x 32 elements."""

    fuses_norm = True

    def scales(self, rows: int, columns: int, is_weight: bool) -> tuple[int, torch.dtype]:
        """See Recipe."""
        return rows * -(-columns // 32), torch.uint8


class NVFP4BlockScaling(Recipe):
    """4-bit training.

    Raises:
        ValueError: always; its copies are not modelled.
    """

    def __init__(self, **_settings: Any) -> None:
        raise ValueError("fp4 = nvfp4 cannot be traced: plan with --fp8-format, or in bf16")


class FP8GlobalStateManager:
    """The fp8 context under way."""

    recipe: Recipe | None = None
    initialising: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether layers called now run in fp8."""
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        """Its recipe."""
        return cls.recipe


def fp8_autocast(
    enabled: bool = True, fp8_recipe: Recipe | None = None, **_groups: Any
) -> AbstractContextManager[None]:
    """Layers called inside run in fp8."""
    recipe = (fp8_recipe or DelayedScaling()) if enabled else None
    return Replaced(FP8GlobalStateManager, "recipe", recipe)


def fp8_model_init(
    enabled: bool = True,
    recipe: Recipe | None = None,
    preserve_high_precision_init_val: bool = False,
) -> AbstractContextManager[None]:
    """Layers built inside keep their weights in fp8 alone."""
    del preserve_high_precision_init_val
    recipe = (recipe or DelayedScaling()) if enabled else None
    return Replaced(FP8GlobalStateManager, "initialising", recipe)


@dataclass(frozen=True)
class Quantized:
    """A matrix in fp8.

    Attributes:
        data: [rows, columns], 1 byte an element.
        scale: of its blocks.
    """

    data: Tensor
    scale: Tensor

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What is kept of it."""
        return self.data, self.scale


def empty_copy(like: Tensor, recipe: Recipe, is_weight: bool = False) -> Quantized:
    """A copy of a matrix in fp8, along rows or along columns: the same bytes.

    Args:
        like: [rows, columns].
        recipe: says its scales.
        is_weight: weights may have scales of their own shape.
    """
    number, dtype = recipe.scales(like.shape[0], like.shape[1], is_weight)
    return Quantized(like.new_empty(like.shape, dtype=FP8), like.new_empty(number, dtype=dtype))


def quantize(matrix: Tensor, recipe: Recipe) -> tuple[Quantized, Quantized]:
    """(by rows, by columns): the operand of one product and that of the next, from one kernel."""
    rows, columns = empty_copy(matrix, recipe), empty_copy(matrix, recipe)
    note("fused.cast_fp8", [matrix], [*rows.tensors(), *columns.tensors()])
    return rows, columns


def quantize_weight(matrix: Tensor, copies: tuple[Tensor, ...]) -> None:
    """Cast a weight once a step: taken down in the optimizer's phase, as the update causes it."""
    note("fused.cast_fp8", [matrix], copies, phase=OPTIMIZER)
