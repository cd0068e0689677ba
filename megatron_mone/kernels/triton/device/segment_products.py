"""K9's K3 and K6: x W^T over a block of neurons for the rows that keep it, by sorted pairs.

    up_segments   u = x W_up^T [N, S]; h = p sigma(a) u
    dh_segments   dh = dy W_down^T: da, du, h, and sums of dp by tile
A tile is TILE_M places of one segment (segment_map.py) by 128 of its block's neurons. x and dy are
read from the rows that the pairs have, a, u and dg too: [N, S] is [pairs, B]. h, da and du are
[pairs, B] in sorted order, which the other products read as it stands. Rounding and the ways that
tiles leave are neuron_products.py's. No atomics.
"""

import triton
import triton.language as tl

from megatron_mone.kernels.triton.device.activations import sigma, sigma_prime
from megatron_mone.kernels.triton.device.tiles import (
    dot,
    eighths,
    load,
    matrix,
    quarters,
    segment_of,
    tile_of,
)


@triton.jit
def _product(
    x_ptr, w_ptr, row, inside, neuron, neurons, hidden,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[TILE_M, 128] float32 of these rows and the segment's neurons from `neuron`."""
    w = matrix(w_ptr, neurons, hidden, hidden, 128, TILE_K, TMA)
    column = tl.arange(0, TILE_K)
    at = row[:, None] * hidden + column[None, :]
    total = tl.zeros([TILE_M, 128], dtype=tl.float32)
    for k in range(0, hidden, TILE_K):
        real = inside[:, None] & (k + column < hidden)[None, :]
        left = tl.load(x_ptr + at + k, mask=real, other=0.0)
        right = load(w, neuron, k, neurons, hidden, hidden, 128, TILE_K, TMA)
        total = dot(left, right.T, total, UPCAST)
    return total


@triton.jit
def up_segments_kernel(
    x_ptr, w_ptr, a_ptr, p_ptr, u_ptr, h_ptr, order_ptr,
    offset_ptr, tile_expert_ptr, tile_row_ptr,
    neurons, hidden, units, slots, w_stride, segments, row_tiles,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Persistent: grid (any,). `neurons` are B."""
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    column_tiles = tl.cdiv(neurons, 128)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        tile, column = tile_of(index, row_tiles, column_tiles)
        segment = tl.load(tile_expert_ptr + tile)
        if segment < segments:
            first = tl.load(tile_row_ptr + tile)
            i = tl.arange(0, TILE_M)
            inside = first + i < tl.load(offset_ptr + segment + 1)
            pair = tl.load(order_ptr + first + i, mask=inside, other=0)
            row = (pair // slots).to(tl.int64)
            total = _product(
                x_ptr, segment_of(w_ptr, segment, units, neurons, hidden, w_stride), row, inside,
                column * 128, neurons, hidden, TILE_M, TILE_K, TMA, UPCAST,
            )  # fmt: skip
            p = tl.load(p_ptr + row, mask=inside, other=0.0).to(tl.float32)
            entry = pair.to(tl.int64) * neurons
            h_tile = h_ptr + first.to(tl.int64) * neurons
            parts = quarters(total, TILE_M)
            for part in tl.static_range(4):
                j = column * 128 + part * 32 + tl.arange(0, 32)
                real = inside[:, None] & (j < neurons)[None, :]
                at = entry[:, None] + j[None, :]
                u = parts[part].to(dtype)
                tl.store(u_ptr + at, u, mask=real)
                a = tl.load(a_ptr + at, mask=real, other=0.0).to(tl.float32)
                g = sigma(a, ACTIVATION).to(dtype).to(tl.float32)
                h = p[:, None] * g * u.to(tl.float32)
                tl.store(h_tile + (i * neurons)[:, None] + j[None, :], h.to(dtype), mask=real)


@triton.jit
def _dh_eighth(
    dh, a_ptr, u_ptr, dg_ptr, da_ptr, du_ptr, h_ptr, p, inside, entry, place, j, neurons,
    ACTIVATION: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """Writes da, du and h of 16 neurons; returns the pairs' sums of g u dh."""
    dtype: tl.constexpr = da_ptr.dtype.element_ty
    real = inside[:, None] & (j < neurons)[None, :]
    at = entry[:, None] + j[None, :]
    a = tl.load(a_ptr + at, mask=real, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + at, mask=real, other=0.0).to(tl.float32)
    g = sigma(a, ACTIVATION).to(dtype).to(tl.float32)
    dg = p[:, None] * u * dh
    if BALANCED:
        dg += tl.load(dg_ptr + at, mask=real, other=0.0).to(tl.float32)
    at = place[:, None] + j[None, :]
    tl.store(da_ptr + at, (dg * sigma_prime(a, ACTIVATION)).to(dtype), mask=real)
    tl.store(du_ptr + at, (p[:, None] * g * dh).to(dtype), mask=real)
    tl.store(h_ptr + at, (p[:, None] * g * u).to(dtype), mask=real)
    return tl.sum(tl.where(real, g * u * dh, 0.0), axis=1)


@triton.jit
def dh_segments_kernel(
    dy_ptr, w_ptr, a_ptr, u_ptr, p_ptr, dg_ptr, da_ptr, du_ptr, h_ptr, dp_ptr, order_ptr,
    offset_ptr, tile_expert_ptr, tile_row_ptr,
    neurons, hidden, units, slots, w_stride, segments, row_tiles,
    ACTIVATION: tl.constexpr, BALANCED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Persistent: grid (any,). dg is [N, S], what a balance loss gives the gates; dp is
    [N, SLOTS, ceil(B / 128)]."""
    column_tiles = tl.cdiv(neurons, 128)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        tile, column = tile_of(index, row_tiles, column_tiles)
        segment = tl.load(tile_expert_ptr + tile)
        if segment < segments:
            first = tl.load(tile_row_ptr + tile)
            i = tl.arange(0, TILE_M)
            inside = first + i < tl.load(offset_ptr + segment + 1)
            pair = tl.load(order_ptr + first + i, mask=inside, other=0)
            row = (pair // slots).to(tl.int64)
            total = _product(
                dy_ptr, segment_of(w_ptr, segment, units, neurons, hidden, w_stride), row, inside,
                column * 128, neurons, hidden, TILE_M, TILE_K, TMA, UPCAST,
            )  # fmt: skip
            p = tl.load(p_ptr + row, mask=inside, other=0.0).to(tl.float32)
            pair = pair.to(tl.int64)
            begin = first.to(tl.int64) * neurons
            dp = tl.zeros([TILE_M], dtype=tl.float32)
            parts = eighths(total, TILE_M)
            for part in tl.static_range(8):
                dp += _dh_eighth(
                    parts[part], a_ptr, u_ptr, dg_ptr, da_ptr + begin, du_ptr + begin,
                    h_ptr + begin, p, inside, pair * neurons, i * neurons,
                    column * 128 + part * 16 + tl.arange(0, 16), neurons, ACTIVATION, BALANCED,
                )  # fmt: skip
            tl.store(dp_ptr + pair * column_tiles + column, dp, mask=inside)
