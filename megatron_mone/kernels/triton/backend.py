"""The Triton backend as the registry knows it: what it takes, and which route a call takes.

    Selection, mask of rows of one length     grouped_experts.py
        of few rows without gradients         its products are decode.py's
    rule over all gates, ready mask whose     ragged.py, torch operations around the same products;
    rows have several lengths                 waits for the number of kept entries
Not run on a GPU yet. Importing this needs no triton.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.registry import Backend, Call, GroupedMLPOutput, register
from megatron_mone.kernels.triton import self_check
from megatron_mone.kernels.triton.arguments import ACTIVATIONS
from megatron_mone.kernels.triton.availability import available, interpreted
from megatron_mone.kernels.triton.grouped_experts import masked_experts
from megatron_mone.kernels.triton.launch import is_recording
from megatron_mone.kernels.triton.products import KernelLinears
from megatron_mone.kernels.triton.ragged import ragged_grouped_mlp
from megatron_mone.kernels.triton.row_map import on_device, row_map

NOTE = "not run on a GPU yet: `auto` takes it where its kernels pass a check on the device"


def why_not(call: Call) -> str | None:
    """The reason that a call cannot run here, with what to change, or None."""
    usable, reason = available()
    if not usable and not is_recording():
        return reason
    if call.device != "cuda" and not is_recording() and not interpreted():
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
    return None


def doubt(call: Call) -> str | None:
    """Why `auto` does not trust the kernels on this device: that of self_check.py; or None."""
    if call.device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device to check its kernels on"
    if call.device != "cuda":
        return "the interpreter is for checks"
    device = torch.device("cuda", torch.cuda.current_device())
    return self_check.fault(device, call.dtype, blocks=call.block > 1)


def run(
    x_NH: Tensor, probs_N: Tensor, counts: list[int] | Tensor,
    w_gate_EFH: Tensor, w_up_EFH: Tensor, w_down_EFH: Tensor, *,
    choose: Choose, activation: str, etp_group: Any = None, **_unused: Any,
) -> GroupedMLPOutput:  # fmt: skip
    """See `kernels.grouped_mlp.grouped_mlp_with_gates`; arguments are checked there."""
    weights = (w_gate_EFH, w_up_EFH, w_down_EFH)
    counts = on_device(counts, x_NH.device)
    if not isinstance(choose, Selection) and getattr(choose, "kept", None) is None:
        linears = KernelLinears(row_map(counts, x_NH.shape[0]))
        kept = ragged_grouped_mlp(
            x_NH, probs_N, *weights, choose=choose, activation=activation, linears=linears
        )
        return GroupedMLPOutput(*kept)
    assert isinstance(choose, Selection | NeuronMask)
    y_NH, mask, entries = masked_experts(
        x_NH, probs_N, counts, *weights, choose=choose, activation=activation, etp_group=etp_group
    )
    return GroupedMLPOutput(y_NH, mask, entries=entries)


register(Backend("triton", why_not, run, note=NOTE, counts_on_device=True, doubt=doubt))
