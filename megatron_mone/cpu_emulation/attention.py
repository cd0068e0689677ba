"""Core attention for CPU ranks: Megatron's local one, plus MLA head sizes and context parallelism.

The arithmetic stays in Megatron's `DotProductAttention.forward`. This class widens what it is fed:
keys and values of the whole sequence, and a mask by true positions.

Shapes: s sequence of this rank, S whole sequence (s * CP), b batch, n heads of this TP rank (g of
them for keys and values under grouped queries), d head size.
"""

import copy
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_mone.cpu_emulation.context_parallel import (
    causal_mask,
    gather_sequence,
    zigzag_positions,
)


class EmulatedDotProductAttention(DotProductAttention):
    """Megatron's `DotProductAttention` that also takes MLA's `k_channels` and a CP group.

    With neither it is the stock class, bit for bit. Constructor arguments are the stock ones and
    `k_channels`, `v_channels` (int, head sizes of keys and values).

    Raises ValueError under context parallelism for what a gathered sequence does not cover: a
    sliding window, a softmax with an offset, or a mask type other than causal and no_mask.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        stock_config = config
        if config.context_parallel_size > 1:
            _check_context_parallel(config)
            stock_config = copy.copy(config)
            stock_config.context_parallel_size = 1
        super().__init__(stock_config, layer_number, *args, **kwargs)
        self.config = config
        if k_channels is not None and v_channels is not None:
            # MLA up-projects keys and values for every head, whatever num_query_groups says.
            self.num_query_groups_per_partition = self.num_attention_heads_per_partition
            self.hidden_size_per_attention_head = k_channels
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend: query [s, b, n, dk], key [s, b, g, dk], value [s, b, g, dv] -> [s, b, n * dv].

        `attention_mask` ([1 or b, 1, s, s], True where masked) is used at CP 1 only. Packed
        sequences, with `packed_seq_params` (thd), have no b: [t, n, dk] -> [t, n * dv].
        """
        if packed_seq_params is not None:
            mask = document_mask(packed_seq_params.cu_seqlens_q, len(query))
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
            return self.forward(query, key, value, mask, attn_mask_type, attention_bias).squeeze(1)
        if self.config.context_parallel_size > 1:
            mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
            attention_mask = self._mask(query, mask_type)
            group = self.pg_collection.cp
            width = key.size(-1)
            key_value = gather_sequence(torch.cat([key, value], dim=-1), group)
            key, value = key_value[..., :width], key_value[..., width:]
        # The stock forward takes views over the batch and head dimensions.
        return super().forward(
            query,
            key.contiguous(),
            value.contiguous(),
            attention_mask,
            attn_mask_type,
            attention_bias,
        )

    def _mask(self, query: torch.Tensor, mask_type: AttnMaskType) -> torch.Tensor | None:
        """Return the mask of this rank's queries over the whole sequence, [1, 1, s, S] or None."""
        if mask_type == AttnMaskType.causal:
            group = self.pg_collection.cp
            positions = zigzag_positions(query.size(0) * group.size(), group.size(), group.rank())
            return causal_mask(positions, query.size(0) * group.size())
        if mask_type == AttnMaskType.no_mask:
            return None
        raise ValueError(
            f"attn_mask_type={mask_type} under context parallelism: the CPU emulation knows causal "
            "and no_mask; use context_parallel_size 1"
        )


def document_mask(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """[1, 1, t, t], True where a key is later than the query or of another document.

    Args:
        cu_seqlens: [documents + 1], where each begins and the last ends.
        length: t; what lies behind the last document is one more.
    """
    places = torch.arange(length, device=cu_seqlens.device)
    of = torch.searchsorted(cu_seqlens, places, right=True)
    hidden = (places[None, :] > places[:, None]) | (of[None, :] != of[:, None])
    return hidden[None, None]


def _check_context_parallel(config: Any) -> None:
    """Raise ValueError for settings that need more than a gathered sequence."""
    if config.window_size is not None:
        raise ValueError(
            f"window_size={config.window_size} under context_parallel_size="
            f"{config.context_parallel_size}: not in the CPU emulation; use one of the two"
        )
    if config.softmax_type != "vanilla":
        raise ValueError(
            f"softmax_type={config.softmax_type!r} under context_parallel_size="
            f"{config.context_parallel_size}: not in the CPU emulation; use 'vanilla'"
        )
