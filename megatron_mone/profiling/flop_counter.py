"""Counts the operations of what really ran, knowing nothing of the model: torch's own counter.

`module_flops.py` is a formula; this is what it is held to. torch.utils.flop_counter counts mm,
addmm, bmm, baddbmm, convolutions and fused attention on a GPU. Here is added what it takes for
nothing in a training step:
- grouped_mm, the in-place products, products with a vector, attention fused on a CPU;
- the native kernels of `kernels/cpu`, called through ctypes, which no dispatcher sees: while the
  counter is entered, every call of theirs adds 2 H operations for each entry of the mask it got.
Still nothing: norms, softmax, embeddings, optimizer, sums over rows (bytes, not products), the
sparse Triton kernels, and what a native kernel computes beside kept entries to fill a vector.
May touch: torch, and the methods of `kernels/cpu` for as long as it is entered.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_mone.common.patch import Replaced
from megatron_mone.kernels.cpu import every_neuron
from megatron_mone.kernels.cpu.block_products import BlockProducts
from megatron_mone.kernels.cpu.few_products import FewProducts
from megatron_mone.kernels.cpu.products import SparseProducts

aten = torch.ops.aten


class FlopCounter(FlopCounterMode):
    """Context that counts floating-point operations, forward and backward, of this process.

    A multiply-add is two operations. Not reentrant; slows a step down several times.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=UNCOUNTED)
        self._patches = ExitStack()

    def __enter__(self) -> FlopCounter:
        """Begin; native kernels are watched from here on."""
        super().__enter__()
        for owner, name, products in _NATIVE:
            watched = self._watched(name, getattr(owner, name), products)
            self._patches.enter_context(Replaced(owner, name, watched))
        return self

    def __exit__(self, *failure: Any) -> Any:
        """End; the counts stay readable."""
        self._patches.close()
        return super().__exit__(*failure)

    def total(self) -> int:
        """Operations counted."""
        return int(self.get_total_flops())

    def by_operation(self) -> dict[str, int]:
        """Operations by the name of what ran: "mm", "_grouped_mm", "native sampled", ..."""
        counts = self.get_flop_counts().get("Global", {})
        return {str(key).removeprefix("aten."): int(count) for key, count in counts.items()}

    def _watched(self, name: str, method: Callable, products: Callable[..., int]) -> Callable:
        @wraps(method)
        def counted(*args: Any) -> Any:
            for module in set(self.mod_tracker.parents):
                self.flop_counts[module][f"native {name}"] += products(*args)
            return method(*args)

        return counted


def _kept(products: Any, terms: int = 1) -> int:
    return 2 * terms * products.indices_K.numel() * products.layout.hidden


def _one_term(products: Any, *_operands: Any) -> int:
    return _kept(products)


def _many_terms(products: Any, terms: list, *_operands: Any) -> int:
    return _kept(products, len(terms))


def _all_neurons(x_NH: Tensor, weight_EFH: Tensor, layout: Any, out_NF: Tensor) -> int:
    return 2 * layout.rows * layout.neurons * layout.hidden


_NATIVE: list[tuple[Any, str, Callable[..., int]]] = [
    (every_neuron, "dense_products", _all_neurons)
]
for _route in (SparseProducts, BlockProducts, FewProducts):
    _NATIVE += [
        (_route, "sampled", _one_term),
        (_route, "accumulate", _many_terms),
        (_route, "weight_grads", _many_terms),
    ]


def raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Have torch's counter hand tensors to the formula, not their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


@raw
def grouped_mm_flops(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> int:
    """Of torch's grouped_mm, whose groups cut the dimension that `offs` [G] ends in.

    Args:
        a, b: [M, K] x [G, K, N] (rows cut), [G, M, K] x [K, N] (columns cut), [M, K] x [K, N] (the
            sum cut), or [G, M, K] x [G, K, N].
        offs: [G] int32 ends of the groups; rows, columns or terms beyond the last are not computed.
    """
    used = int(offs[-1]) if offs is not None else 0
    if a.dim() == 2 and b.dim() == 3:
        return 2 * used * a.shape[1] * b.shape[2]
    if a.dim() == 3 and b.dim() == 2:
        return 2 * a.shape[1] * a.shape[2] * used
    if a.dim() == 2:
        return 2 * a.shape[0] * used * b.shape[1]
    return 2 * a.numel() * b.shape[2]


@raw
def _added_product(_sum: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Of sum += a b, batched or not, and with b a vector."""
    return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


@raw
def _vector_product(a: Tensor, _b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel()


@raw
def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Q K^T and the product with V, whole, over [b, n, s, d]; a causal mask is not taken off."""
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return 2 * scores * (query.shape[-1] + value.shape[-1])


@raw
def _attention_backward(
    _dy: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    """Q K^T again, then the gradients of scores, value, query and key."""
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return 2 * scores * (3 * query.shape[-1] + 2 * value.shape[-1])


UNCOUNTED: dict[Any, Callable[..., int]] = {
    aten._grouped_mm: grouped_mm_flops,
    aten.addmm_: _added_product,
    aten.baddbmm_: _added_product,
    aten.addbmm: _added_product,
    aten.addbmm_: _added_product,
    aten.addmv: _added_product,
    aten.addmv_: _added_product,
    aten.mv: _vector_product,
    aten.dot: _vector_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch 2.14's counter has no formula for."""
