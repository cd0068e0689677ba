"""The masked expert in plain torch: the definition every other backend is held to.

It computes every neuron and then masks, so it saves no arithmetic (docs/MODEL.md, "Cost"). With
all neurons kept it makes the same GEMM calls as a stock Megatron expert (gate and up in one product
on [2F, H], down on [H, F]) and is therefore equal to it to the bit.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.common.phases import SELECTION, UP_DOWN_GEMM, enter
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.choice import Choose, promised
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.operands import apply_rule
from megatron_mone.kernels.reference_products import product, put_of
from megatron_mone.kernels.registry import Backend, GroupedMLPOutput, register
from megatron_mone.kernels.weight_views import later_of


def grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    tokens_per_expert: list[int],
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    choose: Choose,
    activation: str,
    etp_group: ProcessGroup | None = None,
    all_gates: bool = False,
) -> GroupedMLPOutput:
    """See `kernels.grouped_mlp.grouped_mlp_with_gates`; arguments are checked there."""
    put = put_of(later_of((w_gate_EFH, w_up_EFH, w_down_EFH)))
    pairs = zip(w_gate_EFH.unbind(), w_up_EFH.unbind(), strict=True)
    gate_up_N2F = product(
        x_NH, tokens_per_expert, (torch.cat(pair) for pair in pairs), put("gate_up")
    )
    a_NF, u_NF = gate_up_N2F.chunk(2, dim=-1)
    gate_NF = gate_activation(activation, a_NF, etp_group)
    enter(SELECTION)
    if isinstance(choose, NeuronMask):
        mask, mask_NF = choose, choose.to_bool()
    else:
        mask_NF = apply_rule(choose, gate_NF.detach())
        mask = NeuronMask.from_bool(mask_NF, *promised(choose))
    enter(UP_DOWN_GEMM)

    h_NF = (gate_NF * u_NF) * probs_N.unsqueeze(-1)
    h_NF = h_NF.to(x_NH.dtype).masked_fill(~mask_NF, 0.0)
    # contiguous [H, F], as a stock fc2 holds it: the same GEMM, the same bits
    downs_HF = (w_down.t().contiguous() for w_down in w_down_EFH.unbind())
    y_NH = product(h_NF, tokens_per_expert, downs_HF, put("down"))
    return GroupedMLPOutput(y_NH, mask, gate_NF[mask_NF], gate_NF if all_gates else None)


register(Backend("reference", why_not=lambda call: None, run=grouped_mlp))
