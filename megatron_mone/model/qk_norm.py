"""Norms of q and k over all heads at once, as OLMoE has them (Megatron's are head by head).

Every tensor-parallel rank has its part of the heads and the whole weight: the sum of squares is
reduced over the ranks. A rank's gradient of the weight is that of its own heads, and Megatron sums
the gradients of every parameter named q_layernorm or k_layernorm over the ranks
(core/distributed/finalize_model_grads.py), so that a weight that is split would be summed wrongly.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor


class AllHeadsNorm(torch.nn.Module):
    """x / rms(x over all heads) * weight, in float32 up to the weight.

    Args:
        of: whose heads: the queries', or the groups' keys.
        config: TransformerConfig.
        hidden_size: of one head.
        eps: added to the mean of squares.

    Attributes:
        weight: [heads * hidden_size], of all ranks.
    """

    def __init__(self, of: Literal["q", "k"], *, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.heads = config.num_attention_heads if of == "q" else config.num_query_groups
        self.eps, self.group = eps, get_tensor_model_parallel_group_if_none(None)
        self.weight = torch.nn.Parameter(torch.ones(self.heads * hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, heads of this rank, hidden_size] of the same.

        With fewer groups than ranks several ranks hold the same key; each counts it in part.
        """
        ranks, here = self.group.size(), x.shape[2]
        first, copies = self.group.rank() * self.heads // ranks, here * ranks // self.heads
        weight = self.weight.view(self.heads, -1)[first : first + here]
        whole = x.float()
        squares = whole.square().sum(dim=(2, 3), keepdim=True) / (copies * self.weight.numel())
        mean = reduce_from_tensor_model_parallel_region(squares, self.group)
        mean = copy_to_tensor_model_parallel_region(mean, self.group)  # every rank reads the mean
        return weight * (whole * torch.rsqrt(mean + self.eps)).type_as(x)


def with_all_heads_norms(layer: Any) -> Any:
    """A copy of a layer's spec whose attention norms q and k over all heads."""
    attention: Any = layer.submodules.self_attention
    norms = {f"{one}_layernorm": partial(AllHeadsNorm, one) for one in ("q", "k")}
    attention = replace(attention, submodules=replace(attention.submodules, **norms))
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))
