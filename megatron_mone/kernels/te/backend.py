"""The Transformer Engine backend: its grouped GEMMs around our selection and masked activation.

    fc1      a = x W_gate^T, u = x W_up^T       dense, two grouped GEMMs
    select   the S largest |sigma(a)|, and h = p sigma(a) u where kept
    fc2      y = h W_down                       dense, h zero elsewhere
Between the GEMMs it runs the Triton kernels where rows keep S each and triton is here, else torch
(kernels/triton/unstructured.py and ragged.py, which say what is saved for backward). The arithmetic
is the dense expert's. An fp8 recipe comes from the autocast context that the call is inside.
Not run on a GPU yet: the GEMMs are Transformer Engine's, and stand-ins take their place in tests.
"""

from typing import Any

import torch

from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.registry import Backend, Call, GroupedMLPOutput, register
from megatron_mone.kernels.te.linears import (
    TransformerEngineLinears,
    active_recipe,
    alignment,
    available,
    why_not_recipe,
)
from megatron_mone.kernels.te.padding import PaddedLinears
from megatron_mone.kernels.triton.arguments import ACTIVATIONS, uniform_rows
from megatron_mone.kernels.triton.availability import available as triton_available
from megatron_mone.kernels.triton.linears import GroupedLinears
from megatron_mone.kernels.triton.ragged import ragged_grouped_mlp
from megatron_mone.kernels.triton.unstructured import masked_grouped_mlp

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


def run(*operands: Any, choose: Choose, activation: str, **_unused: Any) -> GroupedMLPOutput:
    """See `kernels.grouped_mlp.grouped_mlp_with_gates`; arguments are checked there."""
    recipe = active_recipe()
    linears: GroupedLinears = TransformerEngineLinears(recipe)
    if recipe is not None:
        linears = PaddedLinears(linears, alignment(recipe))
    return grouped_mlp_on(linears, *operands, choose=choose, activation=activation)


def grouped_mlp_on(
    linears: GroupedLinears, *operands: Any, choose: Choose, activation: str
) -> GroupedMLPOutput:
    """The masked expert with the dense products of `linears`, on any device; else as `run`."""
    if triton_available()[0] and _rows_are_uniform(choose):
        assert isinstance(choose, Selection | NeuronMask)
        made = masked_grouped_mlp(*operands, choose=choose, activation=activation, linears=linears)
    else:
        made = ragged_grouped_mlp(*operands, choose=choose, activation=activation, linears=linears)
    return GroupedMLPOutput(*made, None)


def _rows_are_uniform(choose: Choose) -> bool:
    if isinstance(choose, NeuronMask):
        return uniform_rows(choose) is not None
    return isinstance(choose, Selection)


register(Backend("te", why_not, run, automatic=False, note=NOTE))
