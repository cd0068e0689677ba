"""What both entry points check and build before a kernel runs. Plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mone.kernels.triton.availability import available
from megatron_mone.moe.neuron_mask import NeuronMask

ACTIVATIONS = ("silu", "sigmoid", "gelu", "relu")


def check(
    x_NH: Tensor,
    probs_N: Tensor,
    counts: Sequence[int],
    weights: tuple[Tensor, Tensor, Tensor],
    activation: str,
) -> None:
    """Refuse what the kernels do not take.

    Raises:
        RuntimeError: the kernels cannot run here.
        ValueError: a dtype, shape, device, count or name.
    """
    usable, reason = available()
    if not usable:
        raise RuntimeError(f"the triton backend is not usable: {reason}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation = {activation!r}: the Triton kernels have {', '.join(ACTIVATIONS)}; use "
            "backend = 'reference'"
        )
    if x_NH.dtype not in (torch.float32, torch.bfloat16) or x_NH.dim() != 2:
        raise ValueError(
            f"x is {x_NH.dtype} of shape {tuple(x_NH.shape)}: it must be [N, H] in torch.float32 "
            "or torch.bfloat16"
        )
    rows, hidden = x_NH.shape
    neurons = weights[0].shape[1] if weights[0].dim() == 3 else 0
    for name, weight in zip(("w_gate", "w_up", "w_down"), weights, strict=True):
        fits = weight.shape == (len(counts), neurons, hidden) and weight.device == x_NH.device
        if not fits or weight.dtype != x_NH.dtype:
            raise ValueError(
                f"{name} is {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}: it "
                f"must be {x_NH.dtype} of shape [{len(counts)}, F, {hidden}] on {x_NH.device}"
            )
    if probs_N.shape != (rows,) or not torch.is_floating_point(probs_N):
        raise ValueError(
            f"probs is {probs_N.dtype} of shape {tuple(probs_N.shape)}: it must be [{rows}] floats"
        )
    if min(counts, default=0) < 0 or sum(counts) != rows:
        raise ValueError(f"counts = {counts} must be counts that sum to the {rows} rows of x")


def expert_of_row(counts: Sequence[int], device: torch.device) -> Tensor:
    """[N] int32 expert of each row."""
    experts = torch.arange(len(counts), dtype=torch.int32)
    return experts.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).to(device)


def uniform_mask(index_NS: Tensor, neurons: int) -> NeuronMask:
    """The mask of rows that keep S neurons each.

    NeuronMask's own checks are skipped: they copy to the host, and rows made by a kernel ascend.
    """
    rows, kept = index_NS.shape
    offsets_N1 = torch.arange(rows + 1, device=index_NS.device) * kept
    return NeuronMask.unchecked(index_NS.reshape(-1), offsets_N1, neurons)
