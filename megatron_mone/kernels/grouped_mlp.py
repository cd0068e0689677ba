"""The masked grouped expert MLP: one public op, checked here, run by a named backend.

Contract: rows are grouped by expert, `tokens_per_expert` counts them; neuron j of expert e is the
three H-vectors w_gate[e, j], w_up[e, j], w_down[e, j]; only masked neurons reach the output.
    a = x W_gate^T, g = sigma(a), mask = the S largest |g| of a row, or as given
    h = p * g * (x W_up^T) where mask, y = h W_down
Usable without Megatron. Shapes: N rows, E experts, F neurons of an expert, H hidden size, K entries
of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.kernels import reference
from megatron_mone.kernels.activations import ACTIVATIONS
from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.cpu import backend as cpu
from megatron_mone.moe.neuron_mask import NeuronMask

BACKENDS = ("reference", "cpu")


class GroupedMLPOutput(NamedTuple):
    """What `grouped_mlp_with_gates` returns."""

    y_NH: Tensor
    """[N, H] expert outputs, the router's probability applied."""
    mask: NeuronMask
    """The neurons computed."""
    gate_K: Tensor
    """[K] gate activations of the mask's entries, with their graph, for a balance loss."""
    gate_NF: Tensor | None
    """[N, F] all gate activations, with their graph, where they were asked for."""


def mone_grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    tokens_per_expert: Sequence[int] | Tensor,
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    neurons_per_token: int | None = None,
    activation: str = "silu",
    neuron_groups: int = 1,
    neuron_mask: NeuronMask | None = None,
    backend: str = "auto",
) -> tuple[Tensor, NeuronMask]:
    """Run the routed rows through their experts, computing only the selected neurons.

    Which ones is chosen here, from the gates, or given: `neurons_per_token` or `neuron_mask`.

    Args:
        x_NH: [N, H] rows grouped by expert.
        probs_N: [N] router probabilities, any float dtype.
        tokens_per_expert: E counts that sum to N.
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype.
        neurons_per_token: S, kept of the F neurons of each row.
        activation: silu, sigmoid, softmax, gelu or relu.
        neuron_groups: G equal contiguous groups, each keeps S / G.
        neuron_mask: N rows over F neurons.
        backend: "reference", "cpu", or "auto" for the fastest usable one.

    Returns:
        y_NH [N, H], and the mask of the neurons computed.

    Raises:
        ValueError: a shape, dtype, count or name that does not fit, before anything is computed.
    """
    if (neurons_per_token is None) == (neuron_mask is None):
        raise ValueError("give either neurons_per_token or neuron_mask: one says what is computed")
    choose: Choose
    if neuron_mask is not None:
        choose = neuron_mask
    else:
        assert neurons_per_token is not None
        choose = Selection(neurons_per_token, neuron_groups)
    output = grouped_mlp_with_gates(
        x_NH,
        probs_N,
        tokens_per_expert,
        w_gate_EFH,
        w_up_EFH,
        w_down_EFH,
        choose=choose,
        activation=activation,
        backend=backend,
    )
    return output.y_NH, output.mask


def grouped_mlp_with_gates(
    x_NH: Tensor,
    probs_N: Tensor,
    tokens_per_expert: Sequence[int] | Tensor,
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    choose: Choose,
    activation: str = "silu",
    etp_group: ProcessGroup | None = None,
    all_gates: bool = False,
    backend: str = "auto",
) -> GroupedMLPOutput:
    """`mone_grouped_mlp` for a layer: any rule of choice, and the gates for a balance loss.

    Args:
        choose: a Selection, a mask, or gate activations [N, F] (detached) -> [N, F] bool.
        etp_group: ranks that hold the other neurons of the same experts, for softmax.
        all_gates: return gate_NF; only the reference has it.

    Raises:
        ValueError: a shape, dtype, count or name that does not fit, before anything is computed.
    """
    counts = [int(n) for n in tokens_per_expert]
    _check_shapes(x_NH, probs_N, counts, w_gate_EFH, w_up_EFH, w_down_EFH)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    _check_choice(choose, x_NH.shape[0], w_gate_EFH.shape[1])
    name = resolve_backend(
        backend,
        activation=activation,
        dtype=x_NH.dtype,
        device=x_NH.device.type,
        all_gates=all_gates,
    )
    weights = (w_gate_EFH, w_up_EFH, w_down_EFH)
    if name == "cpu":
        kept = cpu.masked_grouped_mlp(
            x_NH, probs_N, counts, *weights, choose=choose, activation=activation
        )
        return GroupedMLPOutput(*kept, None)
    y_NH, mask, gate_K, gate_NF = reference.grouped_mlp(
        x_NH, probs_N, counts, *weights, choose=choose, activation=activation, etp_group=etp_group
    )
    return GroupedMLPOutput(y_NH, mask, gate_K, gate_NF if all_gates else None)


def resolve_backend(
    name: str,
    *,
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    all_gates: bool = False,
) -> str:
    """The backend that `name` runs on here.

    Raises:
        ValueError: the name is unknown, or what it needs is not here; says what.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend = {name!r} is not one of auto, {', '.join(BACKENDS)}")
    if name == "reference":
        return name
    reason = _why_not_cpu(activation, dtype, device, all_gates)
    if reason is None:
        return "cpu"
    if name == "cpu":
        raise ValueError(f"backend = 'cpu' cannot run here: {reason}; use 'reference' or 'auto'")
    return "reference"


def _why_not_cpu(activation: str, dtype: torch.dtype, device: str, all_gates: bool) -> str | None:
    if device != "cpu":
        return f"the tensors are on {device}"
    if activation not in cpu.ACTIVATIONS:
        return f"activation = {activation!r} is not one of {', '.join(cpu.ACTIVATIONS)}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the tensors are {dtype}, not float32 or bfloat16"
    if all_gates:
        return "the loss needs the gates of all neurons (mone_ng_loss_type = normalized)"
    usable, reason = cpu.available()
    return None if usable else reason


def _check_choice(choose: Choose, rows: int, neurons: int) -> None:
    if isinstance(choose, NeuronMask):
        _check_mask(choose, rows, neurons)
    elif isinstance(choose, Selection):
        kept, groups = choose.kept, choose.groups
        if groups < 1 or neurons % groups or kept % groups or not groups <= kept <= neurons:
            raise ValueError(
                f"neurons_per_token = {kept} with neuron_groups = {groups}: the groups must divide "
                f"both it and the {neurons} neurons, and it must be {groups} to {neurons}"
            )


def _check_mask(mask: NeuronMask, rows: int, neurons: int) -> None:
    if (mask.num_rows, mask.num_neurons) != (rows, neurons):
        raise ValueError(
            f"neuron_mask has {mask.num_rows} rows over {mask.num_neurons} neurons: x and w_gate "
            f"need {rows} over {neurons}"
        )


def _check_shapes(
    x_NH: Tensor,
    probs_N: Tensor,
    counts: list[int],
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
) -> None:
    if x_NH.dim() != 2:
        raise ValueError(f"x has shape {tuple(x_NH.shape)}: it must be [N, H]")
    rows, hidden = x_NH.shape
    if w_gate_EFH.dim() != 3 or w_gate_EFH.shape[2] != hidden:
        raise ValueError(
            f"w_gate has shape {tuple(w_gate_EFH.shape)}: it must be [E, F, {hidden}] for x "
            f"[{rows}, {hidden}]"
        )
    for name, weight in (("w_up", w_up_EFH), ("w_down", w_down_EFH)):
        if weight.shape != w_gate_EFH.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}: it must be {tuple(w_gate_EFH.shape)}, "
                "as w_gate"
            )
    for name, weight in (("w_gate", w_gate_EFH), ("w_up", w_up_EFH), ("w_down", w_down_EFH)):
        if weight.dtype != x_NH.dtype:
            raise ValueError(f"{name} is {weight.dtype}: it must be {x_NH.dtype}, as x")
    if probs_N.shape != (rows,) or not torch.is_floating_point(probs_N):
        raise ValueError(
            f"probs has shape {tuple(probs_N.shape)} and dtype {probs_N.dtype}: it must be "
            f"[{rows}] floats"
        )
    if len(counts) != w_gate_EFH.shape[0] or min(counts, default=0) < 0 or sum(counts) != rows:
        raise ValueError(
            f"tokens_per_expert = {counts} must be {w_gate_EFH.shape[0]} counts that sum to the "
            f"{rows} rows of x"
        )
