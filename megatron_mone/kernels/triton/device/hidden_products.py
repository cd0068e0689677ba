"""K4, K7: grouped products v W over the hidden size: y = h W_down, dx = da W_gate + du W_up.

Both terms of dx go into one float32 sum. A row of y with a NaN or an infinity is marked in bad_N,
which the selection set to 0: whoever finds one writes the same 1. No atomics.
By segments (segment_map.py) an expert stands for one, rows for places of pairs: v is [P, B] in that
order, and out is written in the pairs' own. Those of a row are then added in order, where it has
several.
"""

import triton
import triton.language as tl

from megatron_mone.kernels.triton.device.tiles import dot, load, matrix, segment_of, tile_of


@triton.jit
def _add(
    total, v, w_ptr, row, expert, column, rows, neurons, hidden, units, w_stride,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    w_ptr = segment_of(w_ptr, expert, units, neurons, hidden, w_stride)
    w = matrix(w_ptr, neurons, hidden, hidden, TILE_K, TILE_N, TMA)
    for k in range(0, neurons, TILE_K):
        left = load(v, row, k, rows, neurons, neurons, TILE_M, TILE_K, TMA)
        right = load(w, k, column, neurons, hidden, hidden, TILE_K, TILE_N, TMA)
        total = dot(left, right, total, UPCAST)
    return total


@triton.jit
def hidden_product_kernel(
    v_ptr, w_ptr, v2_ptr, w2_ptr, out_ptr, bad_ptr, order_ptr,
    offset_ptr, tile_expert_ptr, tile_row_ptr,
    rows, neurons, hidden, units, w_stride, w2_stride, experts, row_tiles,
    TWO: tl.constexpr, CHECKED: tl.constexpr, ORDERED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Persistent: grid (any,)."""
    v = matrix(v_ptr, rows, neurons, neurons, TILE_M, TILE_K, TMA)
    v2 = matrix(v2_ptr, rows, neurons, neurons, TILE_M, TILE_K, TMA)
    column_tiles = tl.cdiv(hidden, TILE_N)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        tile, place = tile_of(index, row_tiles, column_tiles)
        expert = tl.load(tile_expert_ptr + tile)
        if expert < experts:
            row = tl.load(tile_row_ptr + tile)
            end = tl.load(offset_ptr + expert + 1)
            column = place * TILE_N
            total = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
            total = _add(
                total, v, w_ptr, row, expert, column, rows, neurons, hidden, units, w_stride,
                TILE_M, TILE_N, TILE_K, TMA, UPCAST,
            )  # fmt: skip
            if TWO:
                total = _add(
                    total, v2, w2_ptr, row, expert, column, rows, neurons, hidden, units, w2_stride,
                    TILE_M, TILE_N, TILE_K, TMA, UPCAST,
                )  # fmt: skip
            i = row + tl.arange(0, TILE_M)
            j = column + tl.arange(0, TILE_N)
            real = i < end
            if ORDERED:
                i = tl.load(order_ptr + i, mask=real, other=0)
            inside = real[:, None] & (j < hidden)[None, :]
            out = total.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + i.to(tl.int64)[:, None] * hidden + j[None, :], out, mask=inside)
            if CHECKED:
                finite = tl.abs(out.to(tl.float32)) < float("inf")  # of a NaN it is not either
                bad = tl.max((inside & (finite == 0)).to(tl.int32), axis=1)
                tl.store(bad_ptr + i, bad.to(tl.int8), mask=real & (bad > 0))


@triton.jit
def mark_bad_kernel(y_ptr, bad_ptr, offset_ptr, experts, hidden, TILE: tl.constexpr):
    """K4's look at another library's y, one row: grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offset_ptr + experts):
        bad = tl.zeros([TILE], dtype=tl.int32)
        for start in range(0, hidden, TILE):
            j = start + tl.arange(0, TILE)
            y = tl.load(y_ptr + row * hidden + j, mask=j < hidden, other=0.0).to(tl.float32)
            bad |= ((tl.abs(y) < float("inf")) == 0).to(tl.int32)
        tl.store(bad_ptr + row, tl.max(bad, axis=0).to(tl.int8))


@triton.jit
def add_slots_kernel(
    part_ptr, out_ptr, bad_ptr, offset_ptr, experts, hidden,
    SLOTS: tl.constexpr, CHECKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out [N, H]: the parts [N, SLOTS, H] of a row, in order, and its mark: grid
    (N, ceil(H / TILE))."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offset_ptr + experts):
        j = tl.program_id(1) * TILE + tl.arange(0, TILE)
        total = tl.zeros([TILE], dtype=tl.float32)
        for slot in tl.static_range(SLOTS):
            at = (row * SLOTS + slot) * hidden + j
            total += tl.load(part_ptr + at, mask=j < hidden, other=0.0)
        out = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * hidden + j, out, mask=j < hidden)
        if CHECKED:
            bad = tl.max(((tl.abs(out.to(tl.float32)) < float("inf")) == 0).to(tl.int32), axis=0)
            tl.store(bad_ptr + row, bad.to(tl.int8), mask=bad > 0)
