"""K0: rows of each expert -> offsets, and the expert and first row of each tile of rows.

Grouped kernels take their tile from here, so that no count is ever asked for on the host: the
number of tiles is bounded by ceil(N / TILE) + E, and the tiles past the true number name expert E.
"""

import triton
import triton.language as tl


@triton.jit
def row_map_kernel(
    count_ptr,
    offset_ptr,
    chunk_offset_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    experts,
    sources,
    expert_stride,
    source_stride,
    tiles,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOURCES: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES tiles: grid (ceil(tiles / TILES),); the first program also writes the offsets."""
    expert = tl.arange(0, EXPERTS)
    source = tl.arange(0, SOURCES)
    inside = (expert[:, None] < experts) & (source[None, :] < sources)
    at = expert[:, None] * sources + source[None, :]
    given = expert[:, None] * expert_stride + source[None, :] * source_stride
    chunk = tl.load(count_ptr + given, mask=inside, other=0).to(tl.int32)
    count = tl.sum(chunk, axis=1)
    end = tl.cumsum(count, axis=0)
    if tl.program_id(0) == 0:
        tl.store(offset_ptr + expert + 1, end, mask=expert < experts)
        tl.store(offset_ptr, 0)
        within = tl.cumsum(chunk, axis=1)
        chunk_end = within + (end - count)[:, None]
        tl.store(chunk_offset_ptr + at + 1, chunk_end, mask=inside)
        tl.store(chunk_offset_ptr, 0)
    tiles_of = (count + TILE - 1) // TILE
    tile_end = tl.cumsum(tiles_of, axis=0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    before = (tile[:, None] >= tile_end[None, :]) & (expert < experts)[None, :]
    of = tl.sum(before.to(tl.int32), axis=1)
    mine = of[:, None] == expert[None, :]
    first = (end - count)[None, :] + (tile[:, None] - (tile_end - tiles_of)[None, :]) * TILE
    row = tl.sum(tl.where(mine, first, 0), axis=1)
    tl.store(tile_expert_ptr + tile, of, mask=tile < tiles)
    tl.store(tile_row_ptr + tile, row, mask=tile < tiles)
