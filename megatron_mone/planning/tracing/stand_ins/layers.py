"""Stand-ins for the fused functions between the layers of a model, on tensors without values.

- Gated activations: "fused.swiglu", "fused.geglu" and their backward; Megatron's own autograd
  functions around them keep their input (in fp8 where `activation_func_fp8_input_store` asks).
- Bias, dropout and residual: "fused.bias_dropout_add"; keeps the mask, 1 byte an element, where
  anything is dropped.
- Rotary embedding: "fused.rope", out of place; of MLA on q in place, and on k and v together. They
  keep the angles.
- Megatron's own linear layers (the output layer): ops of `linear.py`, with Apex's addition of
  weight gradients to the gradient buffer.

May touch: the names in Megatron's modules that it replaces while `installed`.

Sources: megatron/core/fusions/*.py, transformer_engine/pytorch/cross_entropy.py, attention/rope.py.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.planning.tracing.stand_ins.op import note


def _activation(name: str) -> Callable[..., Tensor]:
    """Of y [..., 2 F] the gated activation [..., F]; a bias is added on the way."""

    def forward(y: Tensor, *bias: Tensor) -> Tensor:
        out = y.new_empty((*y.shape[:-1], y.shape[-1] // 2))
        note(f"fused.{name}", [y, *bias], [out])
        return out

    return forward


def _activation_backward(name: str) -> Callable[..., Tensor]:
    """Of dout [..., F] and y [..., 2 F] dy [..., 2 F]."""

    def backward(dout: Tensor, y: Tensor, *bias: Tensor) -> Tensor:
        dy = torch.empty_like(y)
        note(f"fused.{name}_backward", [dout, y, *bias], [dy])
        return dy

    return backward


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, drops):
        out = torch.empty_like(residual)
        mask = (x.new_empty(x.shape, dtype=torch.bool),) if drops else ()
        note("fused.bias_dropout_add", [x, residual, *(() if bias is None else (bias,))],
             [out, *mask])  # fmt: skip
        ctx.save_for_backward(*mask)
        ctx.bias, ctx.dtype = bias, x.dtype
        return out

    @staticmethod
    def backward(ctx, *gradients):
        (dout,) = gradients
        dx, mask = dout, ctx.saved_tensors
        if mask or dout.dtype != ctx.dtype:
            dx = torch.empty_like(dout, dtype=ctx.dtype)
            note("fused.bias_dropout_add_backward", [dout, *mask], [dx])
        dbias = None
        if ctx.bias is not None:
            dbias = torch.empty_like(ctx.bias)
            note("fused.bias_dropout_add_backward", [dx], [dbias])
        return dx, dbias, dout, None


def _bias_dropout_add(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
) -> Tensor:
    return _BiasDropoutAdd.apply(*x_with_bias, residual, prob > 0)


class _Rope(torch.autograd.Function):
    """Rotated t [.., n, d]: new memory."""

    @staticmethod
    def forward(ctx, t, freqs):
        out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        note("fused.rope", [t, freqs], [out])
        ctx.save_for_backward(freqs)
        return out

    @staticmethod
    def backward(ctx, *gradients):
        (freqs,) = ctx.saved_tensors
        dt = torch.empty_like(gradients[0])
        note("fused.rope", [gradients[0], freqs], [dt])
        return dt, None


def apply_rotary_pos_emb(t: Tensor, freqs: Tensor, **layout: Any) -> Tensor:
    """transformer_engine.pytorch.attention.rope.apply_rotary_pos_emb, fused.

    Args:
        t: [s, b, n, d]; of packed documents [t, n, d].
        freqs: [s, 1, 1, d].
        layout: of sequences; changes no shape.
    """
    del layout
    return _Rope.apply(t, freqs)


class _RopeOfQuery(torch.autograd.Function):
    """q [s, b, n, d + e] with its last e rotated in place."""

    @staticmethod
    def forward(ctx, q, cos, sin, rotated):
        ctx.save_for_backward(cos, sin)
        ctx.rotated = rotated
        part = q[..., -rotated:]
        note("fused.rope", [part, cos, sin], [part])
        return q.view(q.shape)

    @staticmethod
    def backward(ctx, *gradients):
        dq = gradients[0].contiguous()
        part = dq[..., -ctx.rotated :]
        note("fused.rope", [part, *ctx.saved_tensors], [part])
        return dq, None, None, None


def _rope_for_q(
    t: Tensor, cos: Tensor, sin: Tensor, qk_head_dim: int, emb_dim: int, *_layout: Any
) -> Tensor:
    del qk_head_dim
    return _RopeOfQuery.apply(t, cos, sin, emb_dim)


class _RopeOfKeyValue(torch.autograd.Function):
    """kv [s, b, n, d + v] and the shared rotary part [s, b, 1, e] -> k [.., d + e], v [.., v]."""

    @staticmethod
    def forward(ctx, kv, shared, cos, sin, v_dim):
        ctx.save_for_backward(cos, sin)
        ctx.shapes = kv.shape, shared.shape
        k_dim = kv.shape[-1] - v_dim + shared.shape[-1]
        key, value = kv.new_empty((*kv.shape[:-1], k_dim)), kv.new_empty((*kv.shape[:-1], v_dim))
        note("fused.rope", [kv, shared, cos, sin], [key, value])
        return key, value

    @staticmethod
    def backward(ctx, *gradients):
        dkv, dshared = (gradients[0].new_empty(shape) for shape in ctx.shapes)
        note("fused.rope", [*gradients, *ctx.saved_tensors], [dkv, dshared])
        return dkv, dshared, None, None, None


def _rope_for_kv(
    kv: Tensor, k_pos_emb: Tensor, cos: Tensor, sin: Tensor, emb_dim: int, k_dim: int, v_dim: int,
    *_layout: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    del emb_dim, k_dim
    return _RopeOfKeyValue.apply(kv, k_pos_emb, cos, sin, v_dim)


@contextmanager
def installed() -> Iterator[None]:
    """While it lasts Megatron's fused functions are these, whichever of them a model calls."""
    from megatron.core.fusions import fused_bias_dropout, fused_bias_geglu, fused_bias_swiglu
    from megatron.core.models.common.language_module import language_module
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import multi_latent_attention

    from megatron_mone.planning.tracing.stand_ins.cross_entropy import native_cross_entropy
    from megatron_mone.planning.tracing.stand_ins.linear import linear_of_megatron

    replaced: list[tuple[Any, dict[str, Any]]] = [
        (fused_bias_dropout, {"bias_dropout_add_fused_train": _bias_dropout_add}),
        (
            multi_latent_attention,
            {
                "fused_apply_mla_rope_for_q": _rope_for_q,
                "fused_apply_mla_rope_for_kv": _rope_for_kv,
            },
        ),
        (layers, {"linear_with_grad_accumulation_and_async_allreduce": linear_of_megatron}),
        (language_module, {"fused_vocab_parallel_cross_entropy": native_cross_entropy}),
    ]
    for module, name in ((fused_bias_swiglu, "swiglu"), (fused_bias_geglu, "geglu")):
        names = {}
        for prefix in ("", "bias_"):
            names[f"{prefix}{name}"] = _activation(name)
            names[f"{prefix}{name}_back"] = _activation_backward(name)
        replaced.append((module, names))
    with ExitStack() as stack:
        for module, names in replaced:
            for name, stand_in in names.items():
                stack.enter_context(Replaced(module, name, stand_in))
        yield
