"""K2: rows of gates -> the exact top-S by |sigma(a)| as words of bits, and kept entries compact.

    select         chooses                   reads a [N, F]; blocks of other sizes than powers of
                                             two, and large ones: block_selection.py
    compact        takes ready words         reads a [N, F]
    rebuild        for the backward pass     reads words, and kept a for the balance loss
Contract: of every group of neurons S / G are kept, or with blocks S / (G B) of the blocks of B by
their sums of |g|: exactly that many, ties to the lower index, NaN ranked as infinity
(kernels/neuron_selection.py). g is rounded to a's dtype; sums of a block are added in halves in
float32. The S-th largest is found by bisecting ordered bits, the last of equal ones by bisecting
its index: reductions alone, so that a row of 16,384 neurons stays in registers. A program owns a
row; rows of no expert keep nothing.
"""

import triton
import triton.language as tl

from megatron_mone.kernels.triton.device.activations import sigma
from megatron_mone.kernels.triton.device.bits import bits_of, pack, rank_of, word_bases


@triton.jit
def ordered_bits(g, BITS: tl.constexpr):
    """|g| as integers of BITS bits in the same order; NaN becomes infinity."""
    bits = g.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits, 0x7F800000) >> (31 - BITS)


@triton.jit
def bounds_of(key, index, kept, BITS: tl.constexpr, INDEX_BITS: tl.constexpr):
    """(key, index) of the last of the `kept` largest keys (0 or more), ties to the lower index."""
    kth = tl.full((), 0, tl.int32)
    step = tl.full((), 1 << (BITS - 1), tl.int32)
    for _ in range(BITS):
        trial = kth | step
        count = tl.sum((key >= trial).to(tl.int32), axis=0)
        kth = tl.where(count >= kept, trial, kth)
        step = step >> 1
    room = kept - tl.sum((key > kth).to(tl.int32), axis=0)
    equal = (key == kth).to(tl.int32)
    limit = tl.full((), 0, tl.int32)  # the largest with fewer than `room` equal keys below it
    step = tl.full((), 1 << (INDEX_BITS - 1), tl.int32)
    for _ in range(INDEX_BITS):
        trial = limit | step
        count = tl.sum(equal * (index < trial).to(tl.int32), axis=0)
        limit = tl.where(count < room, trial, limit)
        step = step >> 1
    return kth, limit


@triton.jit
def is_within(key, index, kth, limit):
    """Whether a key is among the largest of `bounds_of`, as int32."""
    return ((key > kth) | ((key == kth) & (index <= limit))).to(tl.int32)


@triton.jit
def gate_size(value, ACTIVATION: tl.constexpr):
    """|sigma(a)| of a's dtype, in float32."""
    return tl.abs(sigma(value.to(tl.float32), ACTIVATION).to(value.dtype).to(tl.float32))


@triton.jit
def _small_groups(
    a_ptr, key, lane, inside, width, kept, ACTIVATION: tl.constexpr, BITS: tl.constexpr
):
    """The largest in each group of `width` neurons: an entry counts those that come before it."""
    first = lane // width * width
    before = tl.zeros_like(key)
    for other in range(width):
        at = first + other
        value = tl.load(a_ptr + at, mask=inside, other=0.0)
        rival = ordered_bits(gate_size(value, ACTIVATION), BITS)
        ahead = (rival > key) | ((rival == key) & (at < lane))
        before += ahead.to(tl.int32)
    return (inside & (before < kept)).to(tl.int32)


@triton.jit
def _store_entries(
    keep, value, words, row, kept_ptr, word_ptr, base_ptr, kept, number, WORDS: tl.constexpr
):
    """Write a row's words, bases, and kept entries."""
    bases = word_bases(words, WORDS)
    w = tl.arange(0, WORDS)
    tl.store(word_ptr + row * number + w, words, mask=w < number)
    tl.store(base_ptr + row * number + w, bases.to(tl.int16), mask=w < number)
    lane = tl.arange(0, 32)[None, :]
    place = (bases[:, None] + rank_of(words[:, None], lane)).reshape(WORDS * 32)
    tl.store(kept_ptr + row * kept + place, value, mask=keep > 0)


@triton.jit
def select_kernel(
    a_ptr, offset_ptr, word_ptr, base_ptr, kept_ptr, total_ptr, bad_ptr,
    experts, neurons, words, kept, groups,
    ACTIVATION: tl.constexpr, BITS: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK: tl.constexpr,
    HALVINGS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One row: grid (N,). BLOCK is B, 2 to the HALVINGS; GROUPS: how groups are gone through."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offset_ptr + experts):
        a_ptr += row * neurons
        lane = tl.arange(0, WORDS * 32)
        inside = lane < neurons
        value = tl.load(a_ptr + lane, mask=inside, other=0.0)
        size = tl.where(inside, gate_size(value, ACTIVATION), 0.0)
        UNITS: tl.constexpr = WORDS * 32 // BLOCK
        score = size.reshape(UNITS, BLOCK)
        for halving in tl.static_range(HALVINGS):
            score = tl.sum(score.reshape(UNITS, 2, BLOCK >> (halving + 1)), axis=1)
        unit = tl.arange(0, UNITS)
        number = neurons // BLOCK
        key = tl.where(unit < number, ordered_bits(score.reshape(UNITS), BITS), -1)
        if GROUPS == "one":
            kth, limit = bounds_of(key, unit, kept // BLOCK, BITS, INDEX_BITS)
            chosen = is_within(key, unit, kth, limit)
        elif GROUPS == "loop":
            chosen = tl.zeros([UNITS], dtype=tl.int32)
            width = number // groups
            for group in range(groups):
                mine = tl.where(unit // width == group, key, -1)
                kth, limit = bounds_of(mine, unit, kept // BLOCK // groups, BITS, INDEX_BITS)
                chosen += is_within(mine, unit, kth, limit)
        else:
            chosen = _small_groups(
                a_ptr, key, lane, inside, number // groups, kept // groups, ACTIVATION, BITS
            )
        keep = tl.broadcast_to(chosen[:, None], (UNITS, BLOCK)).reshape(WORDS * 32)
        _store_entries(
            keep, value, pack(keep, WORDS), row, kept_ptr, word_ptr, base_ptr, kept, words, WORDS
        )
        tl.store(total_ptr + row, tl.sum(tl.where(keep > 0, size, 0.0), axis=0))
        tl.store(bad_ptr + row, 0)
    else:
        w = tl.arange(0, WORDS)
        tl.store(word_ptr + row * words + w, tl.zeros([WORDS], tl.int32), mask=w < words)


@triton.jit
def select_wide_kernel(
    a_ptr, offset_ptr, word_ptr, base_ptr, kept_ptr, total_ptr, bad_ptr,
    experts, neurons, words, kept,
    ACTIVATION: tl.constexpr, BITS: tl.constexpr, INDEX_BITS: tl.constexpr, WORDS: tl.constexpr,
    STRETCH: tl.constexpr,
):  # fmt: skip
    """As `select` without groups and blocks, for rows whose values do not fit the registers beside
    their keys: read again, from cache, STRETCH words at a time."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offset_ptr + experts):
        a_ptr += row * neurons
        lane = tl.arange(0, WORDS * 32)
        value = tl.load(a_ptr + lane, mask=lane < neurons, other=0.0)
        key = tl.where(lane < neurons, ordered_bits(gate_size(value, ACTIVATION), BITS), -1)
        kth, limit = bounds_of(key, lane, kept, BITS, INDEX_BITS)
        before = tl.full((), 0, tl.int32)
        total = tl.full((), 0.0, tl.float32)
        for first in range(0, words, STRETCH):
            j = first * 32 + tl.arange(0, STRETCH * 32)
            again = tl.load(a_ptr + j, mask=j < neurons, other=0.0)
            size = gate_size(again, ACTIVATION)
            part = tl.where(j < neurons, ordered_bits(size, BITS), -1)
            keep = is_within(part, j, kth, limit)
            mask = pack(keep, STRETCH)
            w = first + tl.arange(0, STRETCH)
            bases = before + word_bases(mask, STRETCH)
            tl.store(word_ptr + row * words + w, mask, mask=w < words)
            tl.store(base_ptr + row * words + w, bases.to(tl.int16), mask=w < words)
            rank = rank_of(mask[:, None], tl.arange(0, 32)[None, :])
            place = (bases[:, None] + rank).reshape(STRETCH * 32)
            tl.store(kept_ptr + row * kept + place, again, mask=keep > 0)
            before += tl.sum(keep, axis=0)
            total += tl.sum(tl.where(keep > 0, size, 0.0), axis=0)
        tl.store(total_ptr + row, total)
        tl.store(bad_ptr + row, 0)
    else:
        w = tl.arange(0, WORDS)
        tl.store(word_ptr + row * words + w, tl.zeros([WORDS], tl.int32), mask=w < words)


@triton.jit
def compact_kernel(
    a_ptr, offset_ptr, word_ptr, base_ptr, kept_ptr, total_ptr, bad_ptr,
    experts, neurons, words, kept,
    ACTIVATION: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One row whose words are ready: grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offset_ptr + experts):
        w = tl.arange(0, WORDS)
        mask = tl.load(word_ptr + row * words + w, mask=w < words, other=0)
        keep = bits_of(mask[:, None], tl.arange(0, 32)[None, :]).reshape(WORDS * 32)
        lane = tl.arange(0, WORDS * 32)
        value = tl.load(a_ptr + row * neurons + lane, mask=keep > 0, other=0.0)
        _store_entries(keep, value, mask, row, kept_ptr, word_ptr, base_ptr, kept, words, WORDS)
        size = tl.where(keep > 0, gate_size(value, ACTIVATION), 0.0)
        tl.store(total_ptr + row, tl.sum(size, axis=0))
        tl.store(bad_ptr + row, 0)


@triton.jit
def rebuild_kernel(
    word_ptr, kept_ptr, offset_ptr, chunk_offset_ptr, block_of_chunk_ptr, weight_ptr, real_ptr,
    loss_scale_ptr, base_ptr, dg_ptr, level_ptr, total_ptr,
    experts, neurons, words, kept, chunks, scale,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE_FREE: tl.constexpr,
    HAS_REAL: tl.constexpr, WORDS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One row: grid (N,). Bases of its words, and the balance loss's gradient of its kept gates,
        dg = sign(g) (weight - L_n) / T_n    L_n = sum of weight |g| / T_n    T_n = sum of |g|
    (L_n = 0, T_n = 1 where not SCALE_FREE). SLOPE is none; whole; or, where other ranks hold the
    rest of the row, sums (T_n and T_n L_n of here) and then rest, which reads them back.
    """
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offset_ptr + experts):
        w = tl.arange(0, WORDS)
        mask = tl.load(word_ptr + row * words + w, mask=w < words, other=0)
        bases = word_bases(mask, WORDS)
        tl.store(base_ptr + row * words + w, bases.to(tl.int16), mask=w < words)
        if SLOPE != "none":
            c = tl.arange(0, CHUNKS)
            ends = tl.load(chunk_offset_ptr + c + 1, mask=c < chunks, other=2147483647)
            chunk = tl.sum((ends <= row).to(tl.int32), axis=0)
            block = tl.load(block_of_chunk_ptr + chunk).to(tl.int64)
            lane = tl.arange(0, 32)[None, :]
            keep = bits_of(mask[:, None], lane) > 0
            place = row * kept + bases[:, None] + rank_of(mask[:, None], lane)
            a = tl.load(kept_ptr + place, mask=keep, other=0.0)
            g = sigma(a.to(tl.float32), ACTIVATION).to(a.dtype).to(tl.float32)
            at = block * neurons + w[:, None] * 32 + lane
            weight = tl.load(weight_ptr + at, mask=keep, other=0.0)
            total = tl.full((), 1.0, tl.float32)
            level = tl.full((), 0.0, tl.float32)
            if SLOPE == "rest":
                total = tl.load(total_ptr + row)
                level = tl.load(level_ptr + row)
            elif SCALE_FREE:
                size = tl.where(keep, tl.abs(g), 0.0)
                total = tl.sum(size.reshape(WORDS * 32), axis=0)
                level = tl.sum((size * weight).reshape(WORDS * 32), axis=0)
            if SLOPE == "sums":
                tl.store(total_ptr + row, total)
                tl.store(level_ptr + row, level)
            else:
                inverse = 1.0 / tl.where(total == 0, 1.0, total)
                factor = inverse * tl.load(loss_scale_ptr).to(tl.float32) * scale
                if HAS_REAL:
                    factor = tl.where(tl.load(real_ptr + row) != 0, factor, 0.0)
                sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
                dg = sign * (weight - level * inverse) * factor
                tl.store(dg_ptr + place, dg.to(dg_ptr.dtype.element_ty), mask=keep)


@triton.jit
def probability_grad_kernel(
    part_ptr, out_ptr, offset_ptr, experts, rows, parts, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """dp [N]: the parts [N, parts] of each row, in order: grid (ceil(N / ROWS),)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    real = row < tl.load(offset_ptr + experts)
    inside = real[:, None] & (part < parts)[None, :]
    value = tl.load(part_ptr + row[:, None] * parts + part[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + row, tl.sum(value, axis=1).to(out_ptr.dtype.element_ty), mask=row < rows)
