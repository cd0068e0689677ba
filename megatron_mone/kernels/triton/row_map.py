"""Where each expert's rows are, on the device: no count of rows is ever asked for on the host.

Shapes: N rows at most, E experts, R sources of an expert's rows, T tiles of TILE rows at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_mone.kernels.triton.launch import launch

TILE = 128  # rows of a tile of the grouped products


@dataclass(frozen=True)
class RowMap:
    """Offsets and tiles of rows that stand grouped by expert, and by source within.

    Attributes:
        offsets_E1: [E + 1] int32; expert e has rows offsets[e] to offsets[e + 1] - 1. Rows from the
            last offset to N are of nobody.
        chunk_offsets_C1: [E * R + 1] int32, the same by source.
        tile_expert_T: [T] int32, expert of each tile; E for tiles past the last.
        tile_row_T: [T] int32, its first row.
        rows: N, a bound.
        sources: R.
        tile: rows of a tile.
    """

    offsets_E1: Tensor
    chunk_offsets_C1: Tensor
    tile_expert_T: Tensor
    tile_row_T: Tensor
    rows: int
    sources: int
    tile: int

    @property
    def experts(self) -> int:
        """E."""
        return self.offsets_E1.numel() - 1

    @property
    def tiles(self) -> int:
        """T."""
        return self.tile_expert_T.numel()


def row_map(counts: Tensor, rows: int, tile: int | None = None) -> RowMap:
    """One launch.

    Args:
        counts: [E] or [E, R] integers on the rows' device: rows of each expert, or by source.
        rows: N, at least their sum.
        tile: rows of a tile; TILE when None.
    """
    tile = TILE if tile is None else tile
    experts, sources = counts.shape[0], counts.shape[1] if counts.dim() == 2 else 1
    device, strides = counts.device, (counts.stride(0), counts.stride(-1) if sources > 1 else 0)
    tiles = max(1, min(rows, -(-rows // tile) + experts))
    made = [
        torch.empty(size, dtype=torch.int32, device=device)
        for size in (experts + 1, experts * sources + 1, tiles, tiles)
    ]
    many = 128
    launch(
        "row_map.row_map", (-(-tiles // many),), (counts, *made, experts, sources, *strides, tiles),
        reads=(counts,), writes=made,
        TILE=tile, EXPERTS=power_of_two(experts), SOURCES=power_of_two(sources), TILES=many,
    )  # fmt: skip
    return RowMap(made[0], made[1], made[2], made[3], rows, sources, tile)


def on_device(counts: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Row counts as `row_map` takes them; a sequence, or a tensor elsewhere, is copied."""
    if isinstance(counts, Tensor):
        return counts.to(device)
    return torch.tensor(counts, dtype=torch.int64).to(device)


@cache
def power_of_two(size: int) -> int:
    """The lowest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()
