"""Tokens under Megatron's padding mask, told at their experts after dispatch.

Megatron's router leaves them out of its balance losses and load counts and routes them like any
other token. So must the neurons' balance, for which a row's mark has to reach the rank of its
expert. A router's probability is never negative and travels with the row through every dispatcher:
its sign carries the mark, exactly in both passes, and moves no byte. Touches nothing.

Shapes: T tokens of this rank, E experts, N routed rows.
"""

import torch
from torch import Tensor


def mark_padding(probs_TE: Tensor, padding_T: Tensor) -> Tensor:
    """The probabilities, negative for padding; of any number of columns.

    Args:
        probs_TE: [T, E] at least 0.
        padding_T: [T] bool, True for padding.
    """
    return torch.where(padding_T.unsqueeze(1), -probs_TE, probs_TE)


def unmark_padding(probs_N: Tensor) -> tuple[Tensor, Tensor]:
    """([N] the probabilities that were marked, [N] bool, True for rows of padding)."""
    padding_N = probs_N.signbit()  # of -0.0 too
    return torch.where(padding_N, -probs_N, probs_N), padding_N
