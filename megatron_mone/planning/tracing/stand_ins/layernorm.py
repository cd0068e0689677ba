"""Stand-ins for Transformer Engine's norms on tensors without values.

"fused.rms_norm" and "fused.layer_norm", forward and backward, one op each. For backward are kept
the input and, in fp32, each row's 1 / deviation (of a layer norm its mean too). May touch: nothing.

Sources: transformer_engine/pytorch/module/_common.py, ops/basic/rmsnorm.py, layer_norm.py.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mone.planning.tracing.stand_ins.fp8 import Quantized
from megatron_mone.planning.tracing.stand_ins.op import note


def norm_forward(
    kind: str, x_MH: Tensor, gamma: Tensor, beta: Tensor | None,
    copies: tuple[Quantized, Quantized] | None = None,
) -> tuple[Tensor | None, tuple[Tensor, ...]]:  # fmt: skip
    """(normalised [M, H], statistics).

    Args:
        kind: "rms_norm" or "layer_norm".
        x_MH: rows.
        gamma, beta: [H].
        copies: in fp8, written in place of the 16-bit result, which is then None.
    """
    stats = tuple(
        x_MH.new_empty(x_MH.shape[0], dtype=torch.float32)
        for _ in range(1 if kind == "rms_norm" else 2)
    )
    normed = torch.empty_like(x_MH) if copies is None else None
    made = [normed] if copies is None else [t for copy in copies for t in copy.tensors()]
    weights = [gamma] if beta is None else [gamma, beta]
    note(f"fused.{kind}", [x_MH, *weights], [*made, *stats])  # type: ignore[list-item]
    return normed, stats


def norm_backward(
    kind: str, dy_MH: Tensor, x_MH: Tensor, stats: tuple[Tensor, ...], gamma: Tensor,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dx [M, H], dgamma [H], dbeta [H] or None)."""
    dx_MH, dgamma = torch.empty_like(x_MH), torch.empty_like(gamma)
    dbeta = None if beta is None else torch.empty_like(beta)
    made = [dx_MH, dgamma] if dbeta is None else [dx_MH, dgamma, dbeta]
    note(f"fused.{kind}_backward", [dy_MH, x_MH, gamma, *stats], made)
    return dx_MH, dgamma, dbeta


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, kind):
        x_MH = x.reshape(-1, x.shape[-1])
        normed, stats = norm_forward(kind, x_MH, gamma, beta)
        ctx.save_for_backward(x_MH, *stats)
        ctx.weights, ctx.kind, ctx.shape = (gamma, beta), kind, x.shape
        return normed.view(x.shape)  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx, *gradients):
        x_MH, *stats = ctx.saved_tensors
        dy_MH = gradients[0].reshape(x_MH.shape)
        dx, dgamma, dbeta = norm_backward(ctx.kind, dy_MH, x_MH, tuple(stats), *ctx.weights)
        return dx.view(ctx.shape), dgamma, dbeta, None


class RMSNorm(torch.nn.Module):
    """transformer_engine.pytorch.RMSNorm.

    Args:
        normalized_shape: H, width of a row.
        sequence_parallel: mark the weights: their gradients are summed over tensor-parallel ranks.
        params_dtype, device: of the weights.
        tuning: names that change no shape.
    """

    kind = "rms_norm"

    def __init__(
        self, normalized_shape: int, *, sequence_parallel: bool, params_dtype: torch.dtype,
        device: Any, **tuning: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        del tuning
        options: Any = {"dtype": params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.empty(normalized_shape, **options))
        self.bias = None
        if self.kind == "layer_norm":
            self.bias = torch.nn.Parameter(torch.empty(normalized_shape, **options))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] normalised."""
        return _Norm.apply(x, self.weight, self.bias, self.kind)


class LayerNorm(RMSNorm):
    """transformer_engine.pytorch.LayerNorm; see RMSNorm, with a bias."""

    kind = "layer_norm"
