"""What each part of a layer adds to the residual stream, multiplied by a number, as in Granite."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]
"""Megatron's: a part's output and its bias, the residual, a dropout's probability -> their sum."""


def with_scaled_parts(layer: Any, scale: float) -> Any:
    """A copy of a layer's spec whose attention and MLP are multiplied before they are added."""
    parts = layer.submodules
    attention, mlp = (_scaled(add, scale) for add in (parts.self_attn_bda, parts.mlp_bda))
    return replace(layer, submodules=replace(parts, self_attn_bda=attention, mlp_bda=mlp))


def _scaled(stock: Callable[[bool, bool], Add], scale: float) -> Callable[[bool, bool], Add]:
    def get_add(training: bool, fused: bool) -> Add:
        add = stock(training, fused)

        def scaled(
            with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
        ) -> Tensor:
            x, bias = with_bias
            return add((x * scale, None if bias is None else bias * scale), residual, dropout)

        return scaled

    return get_add
