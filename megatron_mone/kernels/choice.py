"""How an expert's neurons are chosen, as every backend takes it. May touch: torch, NeuronMask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_mone.moe.neuron_mask import NeuronMask


@dataclass(frozen=True)
class Selection:
    """Exact top-S of |g| per row, ties to the lower index, NaN above every number.

    Attributes:
        kept: S neurons of each row.
        groups: G equal contiguous groups of the F neurons; each keeps S / G.
    """

    kept: int
    groups: int = 1


Choose = Selection | NeuronMask | Callable[[Tensor], Tensor]
"""A selection; a ready mask; or gate activations [N, F] (detached) -> [N, F] bool."""
