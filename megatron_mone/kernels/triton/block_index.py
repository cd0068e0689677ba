"""Which rows keep which block of neurons, as tiles for the block-sparse GEMMs. Plain torch.

A pair is (row, slot): row n's slot-th kept block. Pairs are sorted by segment, and a segment is one
block of one expert: a small expert of its own, whose weights are `block` adjacent rows of [F, H].
Built without a copy to the host: the number of tiles is bounded from the shapes, and the tiles past
the true number carry a segment that does not exist. The sort is stable, so it is deterministic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 64  # pairs of a tile; the GEMMs' tile height


@dataclass(frozen=True)
class BlockIndex:
    """Shapes: N rows, Q blocks kept per row, P = N Q pairs, Z = E F / block segments, T tiles.

    Attributes:
        pairs_P: int32 pair numbers (row * Q + slot) in segment order.
        offsets_Z1: int32; segment z holds pairs_P[offsets_Z1[z] : offsets_Z1[z + 1]].
        tile_segment_T: int32 segment of each tile, Z when the tile is padding.
        tile_first_T: int32 first place in pairs_P of each tile.
        slots: Q.
        block: neurons of a block.
    """

    pairs_P: Tensor
    offsets_Z1: Tensor
    tile_segment_T: Tensor
    tile_first_T: Tensor
    slots: int
    block: int

    @property
    def segments(self) -> int:
        """Z."""
        return self.offsets_Z1.numel() - 1

    @property
    def tiles(self) -> int:
        """T, padding included."""
        return self.tile_segment_T.numel()


def block_index(
    blocks_NQ: Tensor,
    expert_N: Tensor,
    experts: int,
    neurons: int,
    block: int,
    tile_rows: int = TILE_ROWS,
) -> BlockIndex:
    """The index of `blocks_NQ` ([N, Q] block numbers of each row, 0 to F / block - 1).

    Args:
        blocks_NQ: any integer type, no block twice in a row.
        expert_N: [N] expert of each row.
        experts, neurons, block: E, F and the neurons of a block.
        tile_rows: pairs of a tile.
    """
    per_expert = neurons // block
    segments = experts * per_expert
    key_P = (expert_N.long()[:, None] * per_expert + blocks_NQ.long()).flatten()
    sorted_P, pairs_P = torch.sort(key_P, stable=True)
    edges = torch.arange(segments + 1, device=key_P.device)
    offsets_Z1 = torch.searchsorted(sorted_P, edges)
    tiles_Z = (offsets_Z1.diff() + tile_rows - 1) // tile_rows
    ends_Z = tiles_Z.cumsum(0)
    bound = -(-key_P.numel() // tile_rows) + min(segments, key_P.numel())
    tile_T = torch.arange(bound, device=key_P.device)
    segment_T = torch.searchsorted(ends_Z, tile_T, right=True)
    real_T = segment_T.clamp(max=segments - 1)
    within_T = tile_T - (ends_Z - tiles_Z)[real_T]
    first_T = offsets_Z1[real_T] + within_T * tile_rows
    return BlockIndex(
        pairs_P.int(), offsets_Z1.int(), segment_T.int(), first_T.int(), blocks_NQ.shape[1], block
    )
