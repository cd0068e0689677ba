"""The masked grouped expert MLP: one public op, checked here, run by a named backend.

Contract: rows are grouped by expert, `tokens_per_expert` counts them; neuron j of expert e is the
three H-vectors w_gate[e, j], w_up[e, j], w_down[e, j]; only masked neurons reach the output.
    a = x W_gate^T, g = sigma(a), mask = select(g) or as given
    h = p * g * (x W_up^T) where mask, y = h W_down
Usable without Megatron. Shapes: N rows, E experts, F neurons of an expert, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.kernels import reference
from megatron_mone.kernels.activations import ACTIVATIONS
from megatron_mone.moe.neuron_mask import NeuronMask

BACKENDS: dict[str, Callable] = {"reference": reference.grouped_mlp}


class GroupedMLPOutput(NamedTuple):
    """What `mone_grouped_mlp` returns."""

    y_NH: Tensor
    """[N, H] expert outputs, the router's probability applied."""
    mask_NF: Tensor
    """[N, F] bool, the neurons computed."""
    gate_NF: Tensor
    """[N, F] gate activations with their autograd graph, for a balance loss."""


def mone_grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    tokens_per_expert: Sequence[int] | Tensor,
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    select: Callable[[Tensor], Tensor] | None = None,
    neuron_mask: NeuronMask | None = None,
    activation: str = "silu",
    etp_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> GroupedMLPOutput:
    """Run the routed rows through their experts, computing only the selected neurons.

    Which ones is either chosen here, from the gates, or given: one of `select` and `neuron_mask`.

    Args:
        x_NH: [N, H] rows grouped by expert.
        probs_N: [N] router probabilities, any float dtype.
        tokens_per_expert: E counts that sum to N.
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype.
        select: gate activations [N, F] (detached) -> mask [N, F] bool.
        neuron_mask: N rows over F neurons.
        activation: silu, sigmoid, softmax, gelu or relu.
        etp_group: ranks that hold the other neurons of the same experts, for softmax.
        backend: "reference", or "auto" for the fastest usable one.

    Raises:
        ValueError: a shape, dtype, count or name that does not fit, before anything is computed.
    """
    counts = [int(n) for n in tokens_per_expert]
    _check_shapes(x_NH, probs_N, counts, w_gate_EFH, w_up_EFH, w_down_EFH)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if (select is None) == (neuron_mask is None):
        raise ValueError("give either select or neuron_mask: one says which neurons are computed")
    if neuron_mask is not None:
        _check_mask(neuron_mask, x_NH.shape[0], w_gate_EFH.shape[1])
    run = BACKENDS[resolve_backend(backend)]
    return GroupedMLPOutput(
        *run(
            x_NH,
            probs_N,
            counts,
            w_gate_EFH,
            w_up_EFH,
            w_down_EFH,
            activation=activation,
            select=select,
            neuron_mask=neuron_mask,
            etp_group=etp_group,
        )
    )


def resolve_backend(name: str) -> str:
    """The backend that `name` runs on here.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "auto":
        return "reference"
    if name not in BACKENDS:
        raise ValueError(f"backend = {name!r} is not one of auto, {', '.join(BACKENDS)}")
    return name


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
