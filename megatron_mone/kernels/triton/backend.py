"""The Triton backend as the registry knows it: what it takes, and which route a call takes.

    Selection                               unstructured.py
    Selection, B >= TILED_FROM              blocks from a dense gate product, then blocks.py
    ready mask of such blocks               blocks.py
    ready mask, rows of one length          unstructured.py, without selection
    ready mask, rows of several lengths     ragged.py, torch operations around dense products
In the model of tests/unit/kernels/triton_limits.py the block-sparse kernels lose to dense products
but for B = 128 backward, so only those blocks go there until a GPU has answered.
Not run on a GPU yet. Importing this needs no triton.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.phases import GATE_GEMM, SELECTION, UP_DOWN_GEMM, enter
from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.registry import Backend, Call, GroupedMLPOutput, register
from megatron_mone.kernels.triton.arguments import ACTIVATIONS, uniform_rows
from megatron_mone.kernels.triton.availability import available, interpreted
from megatron_mone.kernels.triton.blocks import BLOCK_SIZES, block_grouped_mlp, choose_blocks
from megatron_mone.kernels.triton.linears import MatmulLinears
from megatron_mone.kernels.triton.ragged import ragged_grouped_mlp
from megatron_mone.kernels.triton.unstructured import masked_grouped_mlp

TILED_FROM = 128  # neurons of the smallest block that the block-sparse kernels get
NOTE = "not run on a GPU yet, so only by name"


def why_not(call: Call) -> str | None:
    """The reason that a call cannot run here, with what to change, or None."""
    usable, reason = available()
    if not usable:
        return reason
    if call.device != "cuda" and not interpreted():
        return f"the tensors are on {call.device}: move them to a CUDA device"
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"the tensors are {call.dtype}: use float32 or bfloat16"
    if call.activation not in ACTIVATIONS:
        return f"activation = {call.activation!r}: the kernels have {', '.join(ACTIVATIONS)}"
    if call.all_gates:
        return (
            "the loss needs the gates of all neurons: set mone_ng_loss_type to another than "
            "normalized"
        )
    if call.by_rule:
        return (
            "neurons are chosen by a function of all gates: set mone_selection = topk, another "
            "mone_ng_loss_type than bias, and mone_neuron_groups to a multiple of the expert "
            "tensor parallel size"
        )
    return None


def run(
    x_NH: Tensor, probs_N: Tensor, counts: list[int],
    w_gate_EFH: Tensor, w_up_EFH: Tensor, w_down_EFH: Tensor, *,
    choose: Choose, activation: str, **_unused: Any,
) -> GroupedMLPOutput:  # fmt: skip
    """See `kernels.grouped_mlp.grouped_mlp_with_gates`; arguments are checked there."""
    assert isinstance(choose, Selection | NeuronMask)  # why_not refuses a rule
    operands = (x_NH, probs_N, counts, w_gate_EFH, w_up_EFH, w_down_EFH)
    index_NS = uniform_rows(choose) if isinstance(choose, NeuronMask) else None
    if isinstance(choose, NeuronMask) and index_NS is None:
        kept = ragged_grouped_mlp(
            *operands, choose=choose, activation=activation, linears=MatmulLinears()
        )
    elif choose.block in BLOCK_SIZES and choose.block >= TILED_FROM:
        if index_NS is None:
            blocks_NQ = _blocks(x_NH, w_gate_EFH, counts, choose, activation)
        else:
            blocks_NQ = index_NS[:, :: choose.block] // choose.block
        kept = block_grouped_mlp(
            *operands, blocks_NQ=blocks_NQ, block=choose.block, activation=activation
        )
    else:
        kept = masked_grouped_mlp(*operands, choose=choose, activation=activation)
    y_NH, mask, gate_K = kept
    return GroupedMLPOutput(y_NH, choose if isinstance(choose, NeuronMask) else mask, gate_K, None)


@torch.no_grad()
def _blocks(x_NH, w_gate_EFH, counts, choose, activation) -> Tensor:
    """[N, S / B] blocks from a dense gate product, which is not kept."""
    enter(GATE_GEMM)
    a_NF = MatmulLinears().rows_by_neurons(x_NH, w_gate_EFH, counts)
    enter(SELECTION)
    blocks_NQ = choose_blocks(a_NF, choose, activation)
    enter(UP_DOWN_GEMM)
    return blocks_NQ


register(Backend("triton", why_not, run, automatic=False, note=NOTE))
