"""The Transformer Engine backend: its grouped GEMMs around our selection and masked activation.

    fc1      a = x W_gate^T, u = x W_up^T       dense, two grouped GEMMs
    select   the S largest |sigma(a)|, and h = p sigma(a) u where kept
    fc2      y = h W_down                       dense, h zero elsewhere
Between the GEMMs it runs the Triton kernels where rows keep S each and triton is here, else torch
(kernels/triton/grouped_experts.py and ragged.py, which say what is kept for backward). The
arithmetic is the dense expert's. An fp8 recipe comes from the autocast context that the call is
inside: operands of the products are quantized; what they give (a, u, dh, y), the choice of neurons
and the activation between them are in x's type. Row counts stay on the device where TE has a
grouped GEMM that takes them (device_counts.py) and rows keep S each; else the host waits for them
once.
Not run on a GPU yet: the GEMMs are Transformer Engine's, and stand-ins take their place in tests.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.operands import host_counts
from megatron_mone.kernels.registry import Backend, Call, GroupedMLPOutput, register
from megatron_mone.kernels.te.delayed import DelayedScales
from megatron_mone.kernels.te.device_counts import DeviceCountLinears, takes_device_counts
from megatron_mone.kernels.te.linears import (
    TransformerEngineLinears,
    active_recipe,
    alignment,
    available,
    why_not_recipe,
)
from megatron_mone.kernels.te.padding import PaddedLinears
from megatron_mone.kernels.triton.arguments import ACTIVATIONS
from megatron_mone.kernels.triton.availability import available as triton_available
from megatron_mone.kernels.triton.grouped_experts import masked_experts
from megatron_mone.kernels.triton.products import GroupedLinears, LinearProducts
from megatron_mone.kernels.triton.ragged import ragged_grouped_mlp
from megatron_mone.kernels.triton.row_map import on_device

NOTE = "not run on a GPU yet, so only by name"


def why_not(call: Call) -> str | None:
    """The reason that a call cannot run here, with what to change, or None."""
    usable, reason = available()
    if not usable:
        return reason
    if call.device != "cuda":
        return f"the tensors are on {call.device}: move them to a CUDA device"
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"the tensors are {call.dtype}: use float32 or bfloat16"
    if call.activation not in ACTIVATIONS:
        return f"activation = {call.activation!r}: it has {', '.join(ACTIVATIONS)}"
    if call.all_gates:
        return (
            "the loss needs the gates of all neurons: set mone_ng_loss_type to another than "
            "normalized"
        )
    return why_not_recipe(active_recipe())


def run(
    x_NH: Tensor, probs_N: Tensor, counts: list[int] | Tensor, *weights: Tensor,
    choose: Choose, activation: str, etp_group: Any = None, **_unused: Any,
) -> GroupedMLPOutput:  # fmt: skip
    """See `kernels.grouped_mlp.grouped_mlp_with_gates`; arguments are checked there.

    Raises:
        ValueError: counts that the host has to know do not sum to N, or delayed scaling of weights
            that have no history.
    """
    recipe = active_recipe()
    make = partial(TransformerEngineLinears, recipe, scales=_scales(recipe, weights[0]))
    linears: GroupedLinears
    if (
        recipe is None
        and isinstance(counts, Tensor)
        and _by_kernels(choose)
        and takes_device_counts(x_NH.dtype, counts.shape[0])
    ):
        linears = DeviceCountLinears(counts.sum(dim=1) if counts.dim() == 2 else counts)
    else:
        counts = host_counts(counts, x_NH.shape[0])
        linears = make(counts) if recipe is None else PaddedLinears(make, counts, alignment(recipe))
    return grouped_mlp_on(
        linears, x_NH, probs_N, counts, *weights, choose=choose, activation=activation,
        etp_group=etp_group,
    )  # fmt: skip


def grouped_mlp_on(
    linears: GroupedLinears, x_NH: Tensor, probs_N: Tensor, counts: list[int] | Tensor,
    *weights: Tensor,
    choose: Choose, activation: str, etp_group: Any = None,
) -> GroupedMLPOutput:  # fmt: skip
    """The masked expert with the dense products of `linears`, on any device; else as `run`."""
    if _by_kernels(choose):
        assert isinstance(choose, Selection | NeuronMask)
        y_NH, mask, entries = masked_experts(
            x_NH, probs_N, on_device(counts, x_NH.device), *weights, choose=choose,
            activation=activation, etp_group=etp_group, products=partial(LinearProducts, linears),
        )  # fmt: skip
        return GroupedMLPOutput(y_NH, mask, entries=entries)
    return GroupedMLPOutput(*ragged_grouped_mlp(
        x_NH, probs_N, *weights, choose=choose, activation=activation, linears=linears
    ))  # fmt: skip


def _scales(recipe: Any, w_gate: Tensor) -> DelayedScales | None:
    """Those that the caller hung on the weights, where the recipe asks for them."""
    if recipe is None or not recipe.delayed():
        return None
    scales: DelayedScales | None = getattr(w_gate, "fp8_scales", None)
    if scales is None:
        raise ValueError(
            "the fp8 recipe is delayed scaling, and w_gate has no fp8_scales (DelayedScales): give "
            "them, or use another recipe"
        )
    return scales


def _by_kernels(choose: Choose) -> bool:
    """Whether our kernels are here and take the choice: S in every row."""
    uniform = choose.kept is not None if isinstance(choose, NeuronMask) else True
    return triton_available()[0] and isinstance(choose, Selection | NeuronMask) and uniform


register(Backend("te", why_not, run, automatic=False, note=NOTE, counts_on_device=True))
