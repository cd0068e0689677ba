"""Pairs (row, slot) sorted by segment (expert, block of neurons), and tiles of them; one launch.

A row keeps SLOTS blocks of neurons, ascending; pair row * SLOTS + slot is its block in that slot.
An expert's pairs take the places from SLOTS times its first row, sorted by block, then by row. So a
segment's first place needs counts of its own expert alone. Tiles of segment z, which starts at
place s, are numbered from s / TILE + z: enough for every segment before it, whatever its count, and
the one number in between that some leave names segment Z, as do those past the last.
"""

import triton
import triton.language as tl

from megatron_mone.kernels.triton.device.bits import bits_of, rank_of


@triton.jit
def _slots_before(word_ptr, base_ptr, i, end, words, neuron, block):
    """Of rows i: (whether the block that starts at `neuron` is kept, how many before it are)."""
    at = i.to(tl.int64) * words + neuron // 32
    word = tl.load(word_ptr + at, mask=i < end, other=0)
    base = tl.load(base_ptr + at, mask=i < end, other=0).to(tl.int32)
    return bits_of(word, neuron % 32), (base + rank_of(word, neuron % 32)) // block


@triton.jit
def segment_map_kernel(
    word_ptr, base_ptr, offset_ptr,
    order_ptr, segment_offset_ptr, tile_segment_ptr, tile_row_ptr,
    words, units, slots, block, tiles,
    TILE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One segment: grid (E * units,), `units` blocks of an expert."""
    segment, last = tl.program_id(0), tl.num_programs(0) - 1
    expert, neuron = segment // units, segment % units * block
    first, end = tl.load(offset_ptr + expert), tl.load(offset_ptr + expert + 1)
    count = tl.full((), 0, tl.int32)
    start = first * slots
    for row in range(first, end, ROWS):
        i = row + tl.arange(0, ROWS)
        keep, slot = _slots_before(word_ptr, base_ptr, i, end, words, neuron, block)
        count += tl.sum(keep, axis=0)
        start += tl.sum(slot, axis=0)
    place = start
    for row in range(first, end, ROWS):
        i = row + tl.arange(0, ROWS)
        keep, slot = _slots_before(word_ptr, base_ptr, i, end, words, neuron, block)
        at = place + tl.cumsum(keep, axis=0) - keep
        tl.store(order_ptr + at, i * slots + slot, mask=keep > 0)
        place += tl.sum(keep, axis=0)
    tl.store(segment_offset_ptr + segment, start)
    tile = start // TILE + segment
    stop = place // TILE + segment + 1
    if segment == last:
        tl.store(segment_offset_ptr + segment + 1, place)
        stop = tiles
    for ahead in range(0, stop - tile, TILES):
        t = ahead + tl.arange(0, TILES)
        at = start + t * TILE
        tl.store(tile_segment_ptr + tile + t, tl.where(at < place, segment, last + 1),
                 mask=tile + t < stop)  # fmt: skip
        tl.store(tile_row_ptr + tile + t, at, mask=tile + t < stop)
