"""The dense products of the reference, expert by expert, in plain torch; their weight gradients are
autograd's, or wait (`weight_views`), by the products that autograd would make: the same bits.

May touch: torch. Shapes: N rows grouped by expert, E experts, C columns of x, R of a product.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Put = Callable[[Callable[[], Tensor]], None]
"""Takes what makes the gradients [E, R, C] of a product's weights."""


def product(
    x_NC: Tensor, counts: list[int], weights_RC: Iterable[Tensor], put: Put | None = None
) -> Tensor:
    """[N, R] x W^T of each expert.

    Args:
        x_NC: [N, C].
        counts: rows of each expert.
        weights_RC: E of [R, C].
        put: called in the backward pass with what makes the weights' gradients, which then gives
            none; autograd makes them when None.
    """
    if put is not None:
        return _Product.apply(x_NC, counts, put, *weights_RC)
    rows = zip(x_NC.split(counts), weights_RC, strict=True)
    return torch.cat([x.matmul(weight.t()) for x, weight in rows])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, counts: list[int], put: Put, *weights_RC: Tensor):
        ctx.save_for_backward(x_NC, *weights_RC)
        ctx.counts, ctx.put = counts, put
        return product(x_NC, counts, weights_RC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NR: Tensor):
        x_NC, *weights_RC = ctx.saved_tensors
        dys = dy_NR.split(ctx.counts)
        if any(ctx.needs_input_grad[3:]):
            ctx.put(partial(_weight_grads, dys, x_NC.split(ctx.counts)))
        dx_NC = None
        if ctx.needs_input_grad[0]:
            rows = zip(dys, weights_RC, strict=True)
            dx_NC = torch.cat([dy.matmul(weight) for dy, weight in rows])
        return dx_NC, None, None, *[None] * len(weights_RC)


def _weight_grads(dys: Sequence[Tensor], xs: Sequence[Tensor]) -> Tensor:
    return torch.stack([dy.t().matmul(x) for dy, x in zip(dys, xs, strict=True)])


def put_of(later: list | None) -> Callable[[str], Put | None]:
    """Of one call of the reference: where to put its gradients of "gate_up" [E, 2F, H] and "down"
    [E, H, F], which are an entry of `later` (see `weight_views`) from the backward pass on."""
    return (lambda name: None) if later is None else _Waiting(later).put_of


class _Waiting:
    def __init__(self, later: list) -> None:
        self._later = later
        self._makers: dict[str, Callable[[], Tensor]] = {}

    def put_of(self, name: str) -> Put:
        return partial(self._put, name)

    def _put(self, name: str, make: Callable[[], Tensor]) -> None:
        if not self._makers:
            self._later.append(self._make)
        self._makers[name] = make

    def _make(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        made = {name: make() for name, make in self._makers.items()}
        gate, up = made["gate_up"].chunk(2, dim=1) if "gate_up" in made else (None, None)
        return gate, up, made["down"].transpose(1, 2) if "down" in made else None
