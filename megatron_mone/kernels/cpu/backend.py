"""The native CPU backend of the masked grouped expert MLP.

    a = x W_gate^T            dense, a tile of rows at a time; only the kept entries of a tile
                              outlive it. A ready mask makes it sparse too.
    choose -> kept (n, j)     exact top-S natively, of neurons or blocks, or the caller's rule
    u = <x_n, W_up_j>, h = p sigma(a) u, y = sum of h W_down_j    kept entries alone
The backward pass is sparse in the mask throughout (docs/MODEL.md). Saved for it, beside x, p
and the weights: a, u and the neuron of each kept entry, and the row offsets; nothing of width F.
Selection is not differentiated. Results do not depend on the number of threads, but for torch's
own GEMM and, where a rule chooses or all are kept, sigma. Sums are in float32: bfloat16 is
converted where it is loaded, no copy of the weights is made but for GEMMs in float32 where nearly
all are kept. route.py says which products run. Shapes: N rows grouped by expert, E experts, F
neurons, H hidden, K kept entries.
"""

from collections.abc import Sequence
from ctypes import byref
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mone.common.phases import UP_DOWN_GEMM, enter
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.choice import Choose, promised
from megatron_mone.kernels.cpu import build, native
from megatron_mone.kernels.cpu.block_products import BlockProducts
from megatron_mone.kernels.cpu.every_neuron import DenseProducts
from megatron_mone.kernels.cpu.few_products import FewProducts
from megatron_mone.kernels.cpu.gate import kept_gates
from megatron_mone.kernels.cpu.products import SparseProducts, empty, scratch, unit_stride
from megatron_mone.kernels.cpu.route import route
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.registry import Backend, Call, GroupedMLPOutput, register
from megatron_mone.kernels.weight_views import Goal, gradient_goals, later_of, sinks_of

ACTIVATIONS = tuple(native.ACTIVATION_CODES)


Products = DenseProducts | BlockProducts | SparseProducts | FewProducts
ROUTES: dict[str, type[Products]] = {
    "dense": DenseProducts,
    "blocks": BlockProducts,
    "sparse": SparseProducts,
    "few": FewProducts,
}


@cache  # asked for in every forward, and a failed build is not to be tried again
def available() -> tuple[bool, str]:
    """Whether the kernels run here, built now if need be; the reason when they do not.

    Raises:
        ValueError: native.SET_ENV names instructions that this processor does not run.
    """
    try:
        native.default_set()
    except build.BuildError as error:
        return False, str(error)
    return True, ""


def masked_grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    counts: Sequence[int],
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    choose: Choose,
    activation: str,
) -> tuple[Tensor, NeuronMask, Tensor, Tensor]:
    """Run the routed rows through their experts, computing only the chosen neurons.

    Args:
        x_NH: [N, H] rows grouped by expert, float32 or bfloat16.
        probs_N: [N] router probabilities, any float dtype.
        counts: E row counts that sum to N.
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype.
        choose: a Selection; a mask; or gate activations [N, F] (detached) -> [N, F] bool, called
            once, for rules that talk to other ranks.
        activation: silu, sigmoid, gelu (by erf), relu or squared_relu.

    Returns:
        y_NH: [N, H] outputs, the router's probability applied.
        mask: the neurons computed.
        gate_K: [K] sigma(a) of the kept entries in the mask's order, with gradient.
        a_K: [K] their pre-activations as backward keeps them, without gradient.

    Raises:
        build.BuildError: the native library cannot be had (see `available`).
    """
    y_NH, gate_K, a_K, indices_K, offsets_N1 = _MaskedGroupedMLP.apply(
        x_NH, probs_N, w_gate_EFH, w_up_EFH, w_down_EFH, counts, choose, activation
    )
    if isinstance(choose, NeuronMask):
        return y_NH, choose, gate_K, a_K
    mask = NeuronMask.unchecked(indices_K, offsets_N1, w_gate_EFH.shape[1], *promised(choose))
    return y_NH, mask, gate_K, a_K


class _MaskedGroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH, probs_N, w_gate, w_up, w_down, counts, choose, activation):
        layout = native.layout(counts, w_gate.shape[1], x_NH.shape[1])
        x_NH = unit_stride(x_NH)
        a_K, gate_K, indices_K, offsets_N1 = kept_gates(x_NH, w_gate, layout, choose, activation)
        enter(UP_DOWN_GEMM)
        block, _ = promised(choose)
        products = _products(layout, indices_K, offsets_N1, x_NH.dtype, block)
        if a_K is None:
            a_K = products.mask_order(_sampled(products, x_NH, w_gate)).to(x_NH.dtype)
            gate_K = gate_activation(activation, a_K)
        assert gate_K is not None
        wide_u_K = _sampled(products, x_NH, w_up)
        u_K = wide_u_K.to(x_NH.dtype)
        h_K = _gated(products, probs_N, gate_K, wide_u_K)
        y_NH = products.accumulate([(h_K, w_down)], x_NH.dtype)
        ctx.save_for_backward(x_NH, probs_N, w_gate, w_up, w_down, a_K, u_K, indices_K, offsets_N1)
        ctx.counts, ctx.activation, ctx.block = counts, activation, block
        weights = (w_gate, w_up, w_down)
        ctx.sinks, ctx.later = sinks_of(weights), later_of(weights)
        ctx.mark_non_differentiable(a_K, indices_K, offsets_N1)
        ctx.set_materialize_grads(False)
        return y_NH, gate_K, a_K, indices_K, offsets_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH, dgate_K, *_without_gradient):
        x_NH, probs_N, w_gate, w_up, w_down, a_K, u_K, indices_K, offsets_N1 = ctx.saved_tensors
        layout = native.layout(ctx.counts, w_gate.shape[1], x_NH.shape[1])
        products = _products(layout, indices_K, offsets_N1, x_NH.dtype, ctx.block)
        dy_NH = torch.zeros_like(x_NH) if dy_NH is None else unit_stride(dy_NH)
        da_K, du_K = (empty(a_K.shape, torch.float32) for _ in range(2))
        space = partial(scratch, "h") if ctx.later is None else empty  # where h may wait
        h_K = space(a_K.shape, torch.float32)
        products.sampled(dy_NH, w_down, da_K)
        dprobs_N = empty(probs_N.shape, torch.float32)
        _gate_backward(
            products, ctx.activation, a_K, u_K, probs_N, dgate_K, da_K, du_K, h_K, dprobs_N
        )
        # What is not needed again goes before the weight gradients come: they are the largest.
        del a_K, u_K
        ctx.maybe_clear_saved_tensors()
        dx_NH = None
        if ctx.needs_input_grad[0]:
            dx_NH = products.accumulate([(da_K, w_gate), (du_K, w_up)], x_NH.dtype)
        goals = gradient_goals((w_gate, w_up, w_down), ctx.sinks, ctx.needs_input_grad[2:5], empty)
        terms = [([(da_K, goals[0]), (du_K, goals[1])], x_NH), ([(h_K, goals[2])], dy_NH)]
        del da_K, du_K
        dw: list[Tensor | None] = [None] * 3
        if ctx.later is None:
            dw = _all_weight_grads(products, terms)
        else:
            ctx.later.append(partial(_all_weight_grads, products, terms))
        return dx_NH, dprobs_N.to(probs_N.dtype), *dw, None, None, None


def _all_weight_grads(
    products: Products, terms: list[tuple[list[tuple[Tensor, Goal | None]], Tensor]]
) -> list[Tensor | None]:
    """`_weight_grads` of each (terms, x_NH), which goes as soon as it was used."""
    made: list[Tensor | None] = []
    products.by_neuron([value for some, _ in terms for value, _ in some])
    while terms:
        made += _weight_grads(products, *terms.pop(0))
    return made


def _weight_grads(
    products: Products, terms: list[tuple[Tensor, Goal | None]], x_NH: Tensor
) -> list[Tensor | None]:
    """value^T x of each (value_K, goal): new tensors; None where there is no goal, or a sink."""
    made = [(value, goal()) for value, goal in terms if goal is not None]
    if made:
        products.weight_grads(made, x_NH)
    new = iter([None if g.adds else g.out_EFH for _, g in made])
    return [None if goal is None else next(new) for _, goal in terms]


def _sampled(products: Products, x_NH: Tensor, weight_EFH: Tensor) -> Tensor:
    """[K] float32 <x_n, weight_j>: fresh where it can be saved as it is, else in the scratch that
    `_gated` overwrites."""
    size = (products.indices_K.numel(),)
    fresh = x_NH.dtype == torch.float32
    out_K = empty(size, torch.float32) if fresh else scratch("h", size, torch.float32)
    products.sampled(x_NH, weight_EFH, out_K)
    return out_K


def _gated(products: Products, probs_N: Tensor, gate_K: Tensor, u_K: Tensor) -> Tensor:
    """h_K = p g u in float32, in scratch: that of u where u was not saved as it is."""
    layout = products.layout
    h_K = u_K if u_K.dtype != gate_K.dtype else scratch("h", u_K.shape, torch.float32)
    p_N = probs_N.float().contiguous()
    products.kernels.gated(
        byref(layout.shape()), byref(native.mask(products.indices_K, products.offsets_N1)),
        _runs(products), native.address(p_N), native.address(gate_K),
        gate_K.element_size(), u_K.data_ptr(), h_K.data_ptr(),
    )  # fmt: skip
    return h_K


def _gate_backward(
    products: Products, activation: str, a_K: Tensor, u_K: Tensor, probs_N: Tensor,
    dgate_K: Tensor | None, da_K: Tensor, du_K: Tensor, h_K: Tensor, dprobs_N: Tensor,
) -> None:  # fmt: skip
    """Write da, du, h and dprobs (float32) from the forward pass and dh, which da holds."""
    layout = products.layout
    blocks = products.spans if isinstance(products, SparseProducts) else 0
    shares = empty((blocks, layout.rows), torch.float32)
    a_K, u_K, p_N = a_K.float(), u_K.float(), probs_N.float().contiguous()
    dgate_K = None if dgate_K is None else dgate_K.float().contiguous()
    products.kernels.gate_backward(
        byref(layout.shape()), byref(native.mask(products.indices_K, products.offsets_N1)),
        _runs(products), native.ACTIVATION_CODES[activation], a_K.data_ptr(), u_K.data_ptr(),
        p_N.data_ptr(), native.address(dgate_K), da_K.data_ptr(), du_K.data_ptr(),
        h_K.data_ptr(), shares.data_ptr(), dprobs_N.data_ptr(),
    )  # fmt: skip


def _runs(products: Products) -> Any:
    """The runs as an argument; null where arrays are in the mask's order."""
    return None if products.runs is None else byref(products.runs)


def _products(
    layout: native.Layout, indices_K: Tensor, offsets_N1: Tensor, dtype: torch.dtype, block: int
) -> Products:
    taken = ROUTES[route(layout, indices_K.numel(), dtype, block)]
    return taken(layout, indices_K, offsets_N1)


def why_not(call: Call) -> str | None:
    """The reason that a call cannot run here, or None."""
    if call.device != "cpu":
        return f"the tensors are on {call.device}"
    if call.activation not in ACTIVATIONS:
        return f"activation = {call.activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"the tensors are {call.dtype}, not float32 or bfloat16"
    if call.all_gates:
        return "the loss needs the gates of all neurons (mone_ng_loss_type = normalized)"
    usable, reason = available()
    return None if usable else reason


def _run(*operands: Any, choose: Choose, activation: str, **_unused: Any) -> GroupedMLPOutput:
    y_NH, mask, gate_K, a_K = masked_grouped_mlp(*operands, choose=choose, activation=activation)
    return GroupedMLPOutput(y_NH, mask, gate_K, a_K=a_K)


register(Backend("cpu", why_not, _run))
