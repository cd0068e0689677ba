"""The `sparse24` backend: two of every four neurons kept, three of nine products on sparse tensor
cores.

mone_neuron_groups = F / 4 with half of the neurons kept is the hardware's 2:4 pattern. Down and dx
then run on torch's semi-structured GEMM (triton/two_four.py), all else on the Triton kernels. torch
has no grouped form of it: the row counts are waited for once a layer, and launches grow with the
number of experts.
Not run on a GPU yet: a stand-in takes the GEMM's place in tests. Importing this needs no triton.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.registry import Backend, Call, GroupedMLPOutput, register
from megatron_mone.kernels.triton import backend as triton
from megatron_mone.kernels.triton import self_check, two_four
from megatron_mone.kernels.triton.grouped_experts import masked_experts
from megatron_mone.kernels.triton.products import TwoFourProducts
from megatron_mone.kernels.triton.row_map import on_device

NOTE = (
    "not run on a GPU yet, so only by name; torch's 2:4 products go an expert at a time and wait "
    "for the row counts"
)


def why_not(call: Call) -> str | None:
    """The reason that a call cannot run here, with what to change, or None.

    The last one is a check of the product on the device, under a second, once a process.
    """
    reason = _why_no_pattern(call) or triton.why_not(call)
    if reason is not None:
        return reason
    if call.device != "cuda":
        return f"the tensors are on {call.device}: move them to a CUDA device"
    if call.dtype != torch.bfloat16:
        return f"the tensors are {call.dtype}: use bfloat16"
    gemm = two_four.gemm_here()
    if isinstance(gemm, str):
        return gemm
    sizes = (
        ("moe_ffn_hidden_size", "neurons on this rank", call.neurons, gemm.neurons),
        ("hidden_size", "", call.hidden, gemm.hidden),
    )
    for field, of, size, multiple in sizes:
        if size is not None and size % multiple:
            value = f"{size} {of}".rstrip()
            return f"{field} = {value}: {gemm.name} takes multiples of {multiple}"
    return self_check.two_four_fault(torch.device("cuda", torch.cuda.current_device()))


def _why_no_pattern(call: Call) -> str | None:
    """Why a call's choice is not two of every four neurons, as far as it is known."""
    if call.by_rule:
        return (
            "a rule over all gates chooses: use mone_selection = topk, mone_ng_loss_type other "
            "than bias, and an expert_tensor_parallel_size that divides mone_neuron_groups"
        )
    if call.block != 1:
        return f"mone_neuron_block = {call.block}: 2:4 keeps single neurons, set it to 1"
    if call.neurons is None:
        return None
    if call.groups is not None and 4 * call.groups != call.neurons:
        return (
            f"mone_neuron_groups = {call.groups} of {call.neurons} neurons: 2:4 keeps two of every "
            f"four, set it to F / 4 = {call.neurons / 4:g}"
        )
    if call.kept_share is not None and call.kept_share != 0.5:
        return f"mone_neuron_ratio = {call.kept_share:g}: 2:4 keeps half, set it to 0.5"
    return None


def run(
    x_NH: Tensor, probs_N: Tensor, counts: list[int], *weights: Tensor,
    choose: Choose, activation: str, etp_group: Any = None, **_unused: Any,
) -> GroupedMLPOutput:  # fmt: skip
    """See `kernels.grouped_mlp.grouped_mlp_with_gates`; arguments are checked there.

    Raises:
        ValueError: a ready mask that is not 2:4; looking waits for it.
    """
    gemm = two_four.gemm_here()
    assert isinstance(choose, Selection | NeuronMask)
    assert not isinstance(gemm, str)
    if isinstance(choose, NeuronMask):
        words_NW, neurons = choose.words(), choose.num_neurons
        if not two_four.keeps_two_of_four(words_NW):
            raise ValueError(
                "neuron_mask has a row that does not keep two of every four neurons, which backend "
                "= 'sparse24' computes: use 'triton'"
            )
        if choose.kept is None:
            choose = NeuronMask.of_words(words_NW, neurons, kept=neurons // 2)
    y_NH, mask, entries = masked_experts(
        x_NH, probs_N, on_device(counts, x_NH.device), *weights, choose=choose,
        activation=activation, etp_group=etp_group, products=partial(TwoFourProducts, gemm, counts),
    )  # fmt: skip
    return GroupedMLPOutput(y_NH, mask, entries=entries)


register(Backend("sparse24", why_not, run, automatic=False, note=NOTE))
