"""transformer_engine.pytorch.permutation without values: rows to their experts and back.

fused.permute, fused.unpermute, fused.sort_chunks, and their backward. Sizes of what they keep are
those of version 2.x: of a permutation of T tokens to E experts the row map, int32 [T, 2 E + 1]; of
a sort int32 [N].
Shapes: T tokens of this rank, N routed rows, E experts, H hidden.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mone.planning.tracing.stand_ins.op import run, unknown

INT = torch.int32


def permute_with_probs(
    tokens: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """moe_permute_with_probs: (rows [N, H], probabilities [N], row map) of tokens [T, H]."""
    rows, (count, experts) = int(num_out_tokens), routing_map.shape
    row_map = unknown((count, 2 * experts + 1), INT)
    outputs = (((rows, tokens.shape[1]), tokens.dtype), ((rows,), probs.dtype))
    return *run("fused.permute", (tokens, probs), outputs, (row_map,)), row_map


def permute(tokens: Tensor, routing_map: Tensor, num_out_tokens: Any) -> tuple[Tensor, Tensor]:
    """moe_permute: (rows [N, H], row map)."""
    count, experts = routing_map.shape
    row_map = unknown((count, 2 * experts + 1), INT)
    outputs = (((int(num_out_tokens), tokens.shape[1]), tokens.dtype),)
    return *run("fused.permute", (tokens,), outputs, (row_map,)), row_map


def permute_and_pad_with_probs(
    tokens: Tensor, probs: Tensor, routing_map: Tensor, tokens_per_expert: Tensor, align_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """moe_permute_and_pad_with_probs: each expert's rows padded to a multiple of `align_size`."""
    padded = (tokens_per_expert + align_size - 1) // align_size * align_size
    made = permute_with_probs(tokens, probs, routing_map, padded.sum())
    return *made, unknown(padded.shape, INT), padded


def unpermute(
    rows: Tensor, row_map: Tensor, merging_probs: None = None, restore_shape: Any = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """moe_unpermute without probabilities, as the dispatchers call it: [N, H] -> [T, H]."""
    assert merging_probs is None
    kept = (row_map,) if pad_offsets is None else (row_map, pad_offsets)
    (tokens,) = run("fused.unpermute", (rows,), ((restore_shape, rows.dtype),), kept)
    return tokens


def sort_chunks(rows: Tensor, split_sizes: Tensor, sorted_idxs: Tensor) -> Tensor:
    """moe_sort_chunks_by_index: [N, H] in another order."""
    kept = (unknown(rows.shape[:1], INT),)
    (moved,) = run("fused.sort_chunks", (rows,), ((rows.shape, rows.dtype),), kept)
    return moved


def sort_chunks_with_probs(
    rows: Tensor, probs: Tensor, split_sizes: Tensor, sorted_idxs: Tensor
) -> tuple[Tensor, Tensor]:
    """moe_sort_chunks_by_index_with_probs: [N, H] and [N] in another order."""
    kept = (unknown(rows.shape[:1], INT),)
    outputs = ((rows.shape, rows.dtype), (probs.shape, probs.dtype))
    return run("fused.sort_chunks", (rows, probs), outputs, kept)
