"""D1, D3: products of few rows, where bytes decide: many small programs, tiles of 16 rows.

    decode_gate   a [N, F] = x W_gate^T, of experts that have rows
    union         the neurons that some row of an expert keeps, ascending [E, F], and their number
    decode_up     u = x W_up^T of the union; h = p sigma(a) u in the union's order, 0 where a row
                  does not keep a neuron of it, and up to the next multiple of TILE_N
    decode_down   parts of y: h W_down over the union, tiles of it dealt out to PARTS programs
Rows of W_up and W_down outside the union are not read. Operands come by pointers: rows of weights
stand anywhere, and a tile of 16 rows is too low for wgmma. Rounding is neuron_products.py's. No
atomics; parts are added in order (hidden_products.py).
"""

import triton
import triton.language as tl

from megatron_mone.kernels.triton.device.activations import sigma
from megatron_mone.kernels.triton.device.bits import bits_of, popcount, rank_of, word_bases
from megatron_mone.kernels.triton.device.tiles import dot


@triton.jit
def _rows(offset_ptr, tile_row_ptr, tile, expert, TILE_M: tl.constexpr):
    """(rows of a tile, which of them are the expert's)."""
    row = tl.load(tile_row_ptr + tile) + tl.arange(0, TILE_M)
    return row.to(tl.int64), row < tl.load(offset_ptr + expert + 1)


@triton.jit
def _product(
    x_ptr, w_ptr, row, inside, neuron, there, hidden,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[TILE_M, TILE_N] float32 of these rows and these neurons of an expert."""
    column = tl.arange(0, TILE_K)
    left_at = row[:, None] * hidden + column[None, :]
    right_at = neuron.to(tl.int64)[:, None] * hidden + column[None, :]
    total = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    for k in range(0, hidden, TILE_K):
        within = (k + column < hidden)[None, :]
        left = tl.load(x_ptr + left_at + k, mask=inside[:, None] & within, other=0.0)
        right = tl.load(w_ptr + right_at + k, mask=there[:, None] & within, other=0.0)
        total = dot(left, right.T, total, UPCAST)
    return total


@triton.jit
def decode_gate_kernel(
    x_ptr, w_ptr, out_ptr, offset_ptr, tile_expert_ptr, tile_row_ptr,
    neurons, hidden, w_stride, experts,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, ceil(F / TILE_N))."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < experts:
        row, inside = _rows(offset_ptr, tile_row_ptr, tile, expert, TILE_M)
        neuron = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
        there = neuron < neurons
        total = _product(
            x_ptr, w_ptr + expert.to(tl.int64) * w_stride, row, inside, neuron, there, hidden,
            TILE_M, TILE_N, TILE_K, UPCAST,
        )  # fmt: skip
        at = row[:, None] * neurons + neuron[None, :]
        out = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=inside[:, None] & there[None, :])


@triton.jit
def union_kernel(word_ptr, offset_ptr, union_ptr, number_ptr, neurons, words, WORDS: tl.constexpr):
    """Grid (E,)."""
    expert = tl.program_id(0)
    first, end = tl.load(offset_ptr + expert), tl.load(offset_ptr + expert + 1)
    word_ptr += first.to(tl.int64) * words
    w = tl.arange(0, WORDS)
    found = tl.zeros([WORDS], dtype=tl.int32)
    for i in range(0, end - first):
        found |= tl.load(word_ptr + i * words + w, mask=w < words, other=0)
    lane = tl.arange(0, 32)[None, :]
    place = word_bases(found, WORDS)[:, None] + rank_of(found[:, None], lane)
    at = expert.to(tl.int64) * neurons + place
    tl.store(union_ptr + at, w[:, None] * 32 + lane, mask=bits_of(found[:, None], lane) > 0)
    tl.store(number_ptr + expert, tl.sum(popcount(found), axis=0))


@triton.jit
def decode_up_kernel(
    x_ptr, w_ptr, a_ptr, p_ptr, word_ptr, base_ptr, union_ptr, number_ptr, h_ptr,
    offset_ptr, tile_expert_ptr, tile_row_ptr,
    neurons, hidden, w_stride, experts, words, kept, width,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, any): a union's length is not known where the grid is."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < experts:
        row, inside = _rows(offset_ptr, tile_row_ptr, tile, expert, TILE_M)
        p = tl.load(p_ptr + row, mask=inside, other=0.0).to(tl.float32)
        number = tl.load(number_ptr + expert)
        union_ptr += expert.to(tl.int64) * neurons
        w_ptr += expert.to(tl.int64) * w_stride
        for first in range(tl.program_id(1) * TILE_N, number, tl.num_programs(1) * TILE_N):
            place = first + tl.arange(0, TILE_N)
            there = place < number
            neuron = tl.load(union_ptr + place, mask=there, other=0)
            total = _product(
                x_ptr, w_ptr, row, inside, neuron, there, hidden, TILE_M, TILE_N, TILE_K, UPCAST
            )
            real = inside[:, None] & there[None, :]
            at = row[:, None] * words + (neuron // 32)[None, :]
            word = tl.load(word_ptr + at, mask=real, other=0)
            base = tl.load(base_ptr + at, mask=real, other=0).to(tl.int32)
            lane = (neuron % 32)[None, :]
            keep = bits_of(word, lane) > 0
            entry = row[:, None] * kept + base + rank_of(word, lane)
            a = tl.load(a_ptr + entry, mask=keep, other=0.0).to(tl.float32)
            g = sigma(a, ACTIVATION).to(dtype).to(tl.float32)
            h = tl.where(keep, p[:, None] * g * total.to(dtype).to(tl.float32), 0.0)
            at = row[:, None] * width + place[None, :]
            tl.store(h_ptr + at, h.to(dtype), mask=inside[:, None])


@triton.jit
def decode_down_kernel(
    h_ptr, w_ptr, union_ptr, number_ptr, part_ptr, offset_ptr, tile_expert_ptr, tile_row_ptr,
    neurons, hidden, w_stride, experts, width,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, FILLED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, ceil(H / TILE_N), PARTS); parts are [N, PARTS, H]. h is there, [N, width],
    up to the union's number or the next multiple of FILLED."""
    tile, part, parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < experts:
        row, inside = _rows(offset_ptr, tile_row_ptr, tile, expert, TILE_M)
        j = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
        number = tl.load(number_ptr + expert)
        union_ptr += expert.to(tl.int64) * neurons
        w_ptr += expert.to(tl.int64) * w_stride
        total = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
        for first in range(part * TILE_K, number, parts * TILE_K):
            place = first + tl.arange(0, TILE_K)
            there = place < number
            filled = place < tl.cdiv(number, FILLED) * FILLED
            at = row[:, None] * width + place[None, :]
            left = tl.load(h_ptr + at, mask=inside[:, None] & filled[None, :], other=0.0)
            neuron = tl.load(union_ptr + place, mask=there, other=0).to(tl.int64)
            at = neuron[:, None] * hidden + j[None, :]
            right = tl.load(w_ptr + at, mask=there[:, None] & (j < hidden)[None, :], other=0.0)
            total = dot(left, right, total, UPCAST)
        at = (row * parts + part)[:, None] * hidden + j[None, :]
        tl.store(part_ptr + at, total, mask=inside[:, None] & (j < hidden)[None, :])
