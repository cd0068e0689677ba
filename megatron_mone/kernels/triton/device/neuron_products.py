"""K1, K3, K6: grouped products x W^T over neurons, with what MoNE does to a tile before it leaves.

    gate_product   a [N, F] = x W_gate^T
    up_product     u = x W_up^T: kept entries compact [N, S]; h = p sigma(a) u [N, F], else zeros
    dh_product     dh = dy W_down^T: da, du, h [N, F], else zeros, and sums of dp by tile
Weights are [E, F, H], experts any stride apart (gate and up share a parameter). A tile is TILE_M
rows of one expert by 128 neurons, and leaves in quarters of 32 neurons, a word of the mask each, or
eighths: the whole tile's positions would not fit the registers. u is rounded to x's dtype before it
is used, and sigma(a) too, as the reference's are. No atomics, each element by one program: the same
bits on every run.
"""

import triton
import triton.language as tl

from megatron_mone.kernels.triton.device.activations import sigma, sigma_prime
from megatron_mone.kernels.triton.device.bits import bits_of, rank_of
from megatron_mone.kernels.triton.device.tiles import dot, eighths, load, matrix, quarters, tile_of


@triton.jit
def _product(
    x, w_ptr, row, expert, neuron, rows, neurons, hidden, w_stride,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[TILE_M, 128] float32 of the rows from `row` and the expert's neurons from `neuron`."""
    w_ptr += expert.to(tl.int64) * w_stride
    w = matrix(w_ptr, neurons, hidden, hidden, 128, TILE_K, TMA)
    total = tl.zeros([TILE_M, 128], dtype=tl.float32)
    for k in range(0, hidden, TILE_K):
        left = load(x, row, k, rows, hidden, hidden, TILE_M, TILE_K, TMA)
        right = load(w, neuron, k, neurons, hidden, hidden, 128, TILE_K, TMA)
        total = dot(left, right.T, total, UPCAST)
    return total


@triton.jit
def gate_product_kernel(
    x_ptr, w_ptr, out_ptr, offset_ptr, tile_expert_ptr, tile_row_ptr,
    rows, neurons, hidden, w_stride, experts, row_tiles,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Persistent: grid (any,)."""
    x = matrix(x_ptr, rows, hidden, hidden, TILE_M, TILE_K, TMA)
    column_tiles = tl.cdiv(neurons, 128)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        tile, column = tile_of(index, row_tiles, column_tiles)
        expert = tl.load(tile_expert_ptr + tile)
        if expert < experts:
            row = tl.load(tile_row_ptr + tile)
            end = tl.load(offset_ptr + expert + 1)
            total = _product(
                x, w_ptr, row, expert, column * 128, rows, neurons, hidden, w_stride,
                TILE_M, TILE_K, TMA, UPCAST,
            )  # fmt: skip
            i = row + tl.arange(0, TILE_M)
            j = column * 128 + tl.arange(0, 128)
            at = i.to(tl.int64)[:, None] * neurons + j[None, :]
            inside = (i < end)[:, None] & (j < neurons)[None, :]
            tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kept(word_ptr, base_ptr, i, inside, word, words, kept, lane):
    """(neuron kept, place of its entry) of lanes of one word of each row, from the tile's first."""
    real = inside & (word < words)
    at = i * words + word
    bits = tl.load(word_ptr + at, mask=real, other=0)[:, None]
    base = tl.load(base_ptr + at, mask=real, other=0).to(tl.int32)[:, None]
    lane = lane[None, :]
    return bits_of(bits, lane) > 0, (i * kept)[:, None] + base + rank_of(bits, lane)


@triton.jit
def _up_quarter(
    u, a_ptr, u_ptr, h_ptr, word_ptr, base_ptr, p, i, inside, word, words, kept, neurons,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, 32)
    keep, place = _kept(word_ptr, base_ptr, i, inside, word, words, kept, lane)
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    u = u.to(dtype)
    tl.store(u_ptr + place, u, mask=keep)
    a = tl.load(a_ptr + place, mask=keep, other=0.0).to(tl.float32)
    g = sigma(a, ACTIVATION).to(dtype).to(tl.float32)
    h = tl.where(keep, p[:, None] * g * u.to(tl.float32), 0.0)
    j = word * 32 + tl.arange(0, 32)
    at = (i * neurons)[:, None] + j[None, :]
    tl.store(h_ptr + at, h.to(dtype), mask=inside[:, None] & (j < neurons)[None, :])


@triton.jit
def _up_tile(
    total, a_ptr, u_ptr, h_ptr, word_ptr, base_ptr, p_ptr, row, end, column, words, kept, neurons,
    ACTIVATION: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Writes u and h of the rows from `row` and the 128 neurons of a column of tiles."""
    i = tl.arange(0, TILE_M)
    inside = row + i < end
    p = tl.load(p_ptr + row + i, mask=inside, other=0.0).to(tl.float32)
    first = row.to(tl.int64)
    parts = quarters(total, TILE_M)
    for part in tl.static_range(4):
        _up_quarter(
            parts[part], a_ptr + first * kept, u_ptr + first * kept,
            h_ptr + first * neurons, word_ptr + first * words, base_ptr + first * words,
            p, i, inside, column * 4 + part, words, kept, neurons, ACTIVATION,
        )  # fmt: skip


@triton.jit
def up_product_kernel(
    x_ptr, w_ptr, a_ptr, p_ptr, word_ptr, base_ptr, u_ptr, h_ptr,
    offset_ptr, tile_expert_ptr, tile_row_ptr,
    rows, neurons, hidden, w_stride, experts, row_tiles, words, kept,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Persistent: grid (any,)."""
    x = matrix(x_ptr, rows, hidden, hidden, TILE_M, TILE_K, TMA)
    column_tiles = tl.cdiv(neurons, 128)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        tile, column = tile_of(index, row_tiles, column_tiles)
        expert = tl.load(tile_expert_ptr + tile)
        if expert < experts:
            row = tl.load(tile_row_ptr + tile)
            end = tl.load(offset_ptr + expert + 1)
            total = _product(
                x, w_ptr, row, expert, column * 128, rows, neurons, hidden, w_stride,
                TILE_M, TILE_K, TMA, UPCAST,
            )  # fmt: skip
            _up_tile(
                total, a_ptr, u_ptr, h_ptr, word_ptr, base_ptr, p_ptr, row, end, column, words,
                kept, neurons, ACTIVATION, TILE_M,
            )  # fmt: skip


@triton.jit
def _dh_eighth(
    dh, a_ptr, u_ptr, dg_ptr, da_ptr, du_ptr, h_ptr, word_ptr, base_ptr, p, i, inside, eighth,
    words, kept, neurons, ACTIVATION: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """Writes da, du and h of 16 neurons; returns the rows' sums of g u dh."""
    word, lane = eighth // 2, eighth % 2 * 16 + tl.arange(0, 16)
    keep, place = _kept(word_ptr, base_ptr, i, inside, word, words, kept, lane)
    dtype: tl.constexpr = da_ptr.dtype.element_ty
    a = tl.load(a_ptr + place, mask=keep, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + place, mask=keep, other=0.0).to(tl.float32)
    g = sigma(a, ACTIVATION).to(dtype).to(tl.float32)
    dg = p[:, None] * u * dh
    if BALANCED:
        dg += tl.load(dg_ptr + place, mask=keep, other=0.0).to(tl.float32)
    da = tl.where(keep, dg * sigma_prime(a, ACTIVATION), 0.0)
    du = tl.where(keep, p[:, None] * g * dh, 0.0)
    h = tl.where(keep, p[:, None] * g * u, 0.0)
    j = word * 32 + lane
    at = (i * neurons)[:, None] + j[None, :]
    real = inside[:, None] & (j < neurons)[None, :]
    tl.store(da_ptr + at, da.to(dtype), mask=real)
    tl.store(du_ptr + at, du.to(dtype), mask=real)
    tl.store(h_ptr + at, h.to(dtype), mask=real)
    return tl.sum(tl.where(keep, g * u * dh, 0.0), axis=1)


@triton.jit
def _dh_tile(
    total, a_ptr, u_ptr, dg_ptr, da_ptr, du_ptr, h_ptr, dp_ptr, word_ptr, base_ptr, p_ptr,
    row, end, column, column_tiles, words, kept, neurons,
    ACTIVATION: tl.constexpr, BALANCED: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Writes da, du, h and the part of dp of the rows from `row` and a column of tiles."""
    i = tl.arange(0, TILE_M)
    inside = row + i < end
    p = tl.load(p_ptr + row + i, mask=inside, other=0.0).to(tl.float32)
    first = row.to(tl.int64)
    dp = tl.zeros([TILE_M], dtype=tl.float32)
    parts = eighths(total, TILE_M)
    for part in tl.static_range(8):
        dp += _dh_eighth(
            parts[part], a_ptr + first * kept, u_ptr + first * kept, dg_ptr + first * kept,
            da_ptr + first * neurons, du_ptr + first * neurons, h_ptr + first * neurons,
            word_ptr + first * words, base_ptr + first * words, p, i, inside,
            column * 8 + part, words, kept, neurons, ACTIVATION, BALANCED,
        )  # fmt: skip
    tl.store(dp_ptr + (first + i) * column_tiles + column, dp, mask=inside)


@triton.jit
def dh_product_kernel(
    dy_ptr, w_ptr, a_ptr, u_ptr, p_ptr, word_ptr, base_ptr, dg_ptr,
    da_ptr, du_ptr, h_ptr, dp_ptr,
    offset_ptr, tile_expert_ptr, tile_row_ptr,
    rows, neurons, hidden, w_stride, experts, row_tiles, words, kept,
    ACTIVATION: tl.constexpr, BALANCED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Persistent: grid (any,). dg is [N, S], what a balance loss gives the gates; dp is
    [N, ceil(F / 128)]."""
    dy = matrix(dy_ptr, rows, hidden, hidden, TILE_M, TILE_K, TMA)
    column_tiles = tl.cdiv(neurons, 128)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        tile, column = tile_of(index, row_tiles, column_tiles)
        expert = tl.load(tile_expert_ptr + tile)
        if expert < experts:
            row = tl.load(tile_row_ptr + tile)
            end = tl.load(offset_ptr + expert + 1)
            total = _product(
                dy, w_ptr, row, expert, column * 128, rows, neurons, hidden, w_stride,
                TILE_M, TILE_K, TMA, UPCAST,
            )  # fmt: skip
            _dh_tile(
                total, a_ptr, u_ptr, dg_ptr, da_ptr, du_ptr, h_ptr, dp_ptr, word_ptr, base_ptr,
                p_ptr, row, end, column, column_tiles, words, kept, neurons, ACTIVATION, BALANCED,
                TILE_M,
            )  # fmt: skip


@triton.jit
def _wide_tile(wide_ptr, row, end, column, neurons, TILE_M: tl.constexpr):
    """[TILE_M, 128] float32 of a product [N, F] that another library made."""
    i, j = tl.arange(0, TILE_M), column * 128 + tl.arange(0, 128)
    at = (i * neurons)[:, None] + j[None, :]
    inside = (row + i < end)[:, None] & (j < neurons)[None, :]
    value = tl.load(wide_ptr + row.to(tl.int64) * neurons + at, mask=inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def up_entries_kernel(
    wide_ptr, a_ptr, p_ptr, word_ptr, base_ptr, u_ptr, h_ptr,
    offset_ptr, tile_expert_ptr, tile_row_ptr, neurons, experts, words, kept,
    ACTIVATION: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """K3 behind another library's x W_up^T: grid (row tiles, ceil(F / 128))."""
    tile, column = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < experts:
        row = tl.load(tile_row_ptr + tile)
        end = tl.load(offset_ptr + expert + 1)
        _up_tile(
            _wide_tile(wide_ptr, row, end, column, neurons, TILE_M),
            a_ptr, u_ptr, h_ptr, word_ptr, base_ptr, p_ptr, row, end, column, words, kept, neurons,
            ACTIVATION, TILE_M,
        )  # fmt: skip


@triton.jit
def dh_entries_kernel(
    wide_ptr, a_ptr, u_ptr, p_ptr, word_ptr, base_ptr, dg_ptr, da_ptr, du_ptr, h_ptr, dp_ptr,
    offset_ptr, tile_expert_ptr, tile_row_ptr, neurons, experts, words, kept,
    ACTIVATION: tl.constexpr, BALANCED: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """K6 behind another library's dy W_down^T: grid (row tiles, ceil(F / 128))."""
    tile, column = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < experts:
        row = tl.load(tile_row_ptr + tile)
        end = tl.load(offset_ptr + expert + 1)
        _dh_tile(
            _wide_tile(wide_ptr, row, end, column, neurons, TILE_M),
            a_ptr, u_ptr, dg_ptr, da_ptr, du_ptr, h_ptr, dp_ptr, word_ptr, base_ptr, p_ptr,
            row, end, column, tl.num_programs(1), words, kept, neurons, ACTIVATION, BALANCED,
            TILE_M,
        )  # fmt: skip
