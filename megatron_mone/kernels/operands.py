"""The tensors of one call, checked once for every backend. May touch: torch, the mask type.

Shapes: N rows grouped by expert, E experts, F neurons of an expert, H hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.neuron_selection import NeuronSelector

WEIGHTS = ("w_gate", "w_up", "w_down")


def check_operands(
    x_NH: Tensor,
    probs_N: Tensor,
    counts: Sequence[int] | Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Refuse what is not x [N, H], probs [N], E counts that sum to N and three [E, F, H] weights of
    x's dtype, all on one device.

    Counts may also be a tensor [E] or [E, R] on x's device; their sum is looked at where that waits
    for nobody, on the CPU.

    Raises:
        ValueError: names the argument, what it is and what it must be.
    """
    if x_NH.dim() != 2 or not torch.is_floating_point(x_NH):
        raise ValueError(
            f"x is {x_NH.dtype} of shape {tuple(x_NH.shape)}: it must be [N, H] floats"
        )
    rows, hidden = x_NH.shape
    if weights[0].dim() != 3 or weights[0].shape[2] != hidden:
        raise ValueError(
            f"w_gate has shape {tuple(weights[0].shape)}: it must be [E, F, {hidden}] for x "
            f"[{rows}, {hidden}]"
        )
    if 0 in weights[0].shape:
        raise ValueError(
            f"w_gate has shape {tuple(weights[0].shape)}: E, F and H must be 1 or more"
        )
    for name, weight in zip(WEIGHTS, weights, strict=True):
        if weight.shape != weights[0].shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}: it must be {tuple(weights[0].shape)}, "
                "as w_gate"
            )
        if weight.dtype != x_NH.dtype:
            raise ValueError(f"{name} is {weight.dtype}: it must be {x_NH.dtype}, as x")
        _check_device(name, weight, x_NH)
    if probs_N.shape != (rows,) or not torch.is_floating_point(probs_N):
        raise ValueError(
            f"probs has shape {tuple(probs_N.shape)} and dtype {probs_N.dtype}: it must be "
            f"[{rows}] floats"
        )
    _check_device("probs", probs_N, x_NH)
    experts = weights[0].shape[0]
    if isinstance(counts, Tensor):
        _check_counts(counts, experts, x_NH)
    elif len(counts) != experts or min(counts, default=0) < 0 or sum(counts) != rows:
        raise ValueError(
            f"tokens_per_expert = {list(counts)} must be {experts} counts that sum to the "
            f"{rows} rows of x"
        )


def _check_counts(counts: Tensor, experts: int, x_NH: Tensor) -> None:
    if not x_NH.is_meta:  # whose rows are counted elsewhere
        _check_device("tokens_per_expert", counts, x_NH)
    fits = counts.dim() in (1, 2) and counts.shape[0] == experts and not counts.is_floating_point()
    if not fits:
        raise ValueError(
            f"tokens_per_expert is {counts.dtype} of shape {tuple(counts.shape)}: it must be "
            f"integers of shape [{experts}], or [{experts}, sources]"
        )
    if type(counts) is Tensor and counts.device.type == "cpu":
        total = int(counts.sum())
        if total > x_NH.shape[0] or int(counts.min()) < 0:
            raise ValueError(
                f"tokens_per_expert = {counts.tolist()} must be counts that sum to at most the "
                f"{x_NH.shape[0]} rows of x"
            )


def host_counts(counts: list[int] | Tensor, rows: int) -> list[int]:
    """Rows of each expert; a tensor's are waited for.

    Raises:
        ValueError: they do not sum to N.
    """
    if isinstance(counts, Tensor):
        counts = (counts.sum(dim=1) if counts.dim() == 2 else counts).tolist()
        if sum(counts) != rows:
            raise ValueError(
                f"tokens_per_expert = {counts} must be counts that sum to the {rows} rows of x: "
                "this backend takes no rows of no expert"
            )
    return counts


def _check_device(name: str, tensor: Tensor, x_NH: Tensor) -> None:
    if tensor.device != x_NH.device:
        raise ValueError(f"{name} is on {tensor.device}: it must be on {x_NH.device}, as x")


def check_choice(choose: Any, rows: int, neurons: int) -> None:
    """Refuse a choice of neurons that N rows over F neurons do not allow.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    if isinstance(choose, NeuronMask):
        if (choose.num_rows, choose.num_neurons) != (rows, neurons):
            raise ValueError(
                f"neuron_mask has {choose.num_rows} rows over {choose.num_neurons} neurons: x and "
                f"w_gate need {rows} over {neurons}"
            )
    elif isinstance(choose, Selection):
        choose.check(neurons)
    elif not callable(choose):
        raise ValueError(f"choose = {choose!r} is not a Selection, a NeuronMask or a function")


def apply_rule(rule: Selection | Callable[[Tensor], Tensor], gate_NF: Tensor) -> Tensor:
    """[N, F] bool that a selection or a caller's rule answers.

    Raises:
        ValueError: it answered something else.
    """
    if isinstance(rule, Selection):
        kept = rule.kept
        rule = NeuronSelector("topk", kept, kept, groups=rule.groups, block=rule.block)
    mask_NF = rule(gate_NF)
    if mask_NF.dtype != torch.bool or mask_NF.shape != gate_NF.shape:
        raise ValueError(
            f"choose returned {mask_NF.dtype} of shape {tuple(mask_NF.shape)}: it must return "
            f"torch.bool of shape {tuple(gate_NF.shape)}"
        )
    return mask_NF
