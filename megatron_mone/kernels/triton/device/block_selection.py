"""K2 for blocks of any size: rows of gates -> the top blocks as words of bits, and a of the kept.

Contract of selection.py. A block's |g| are added as kernels/neuron_selection.py's `block_scores`
defines: zeros fill it up to a power of two, then halves are added. The blocks chosen are gone
through one by one, which suits few: a block's bits and entries are a stretch each.
"""

import triton
import triton.language as tl

from megatron_mone.kernels.triton.device.bits import word_bases
from megatron_mone.kernels.triton.device.selection import (
    bounds_of,
    gate_size,
    is_within,
    ordered_bits,
)


@triton.jit
def _below(count):
    """Words whose lowest `count` bits are set, of any count."""
    some = tl.minimum(tl.maximum(count, 0), 31)
    return tl.where(count >= 32, -1, (1 << some) - 1)


@triton.jit
def _scores(
    a_ptr, number, BLOCK: tl.constexpr, UNITS: tl.constexpr, HALF: tl.constexpr,
    HALVINGS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """[UNITS] sums of |g| of each block; HALF is half the power of two that holds one."""
    unit = tl.arange(0, UNITS)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    at = unit * BLOCK + lane
    real = unit < number
    score = gate_size(tl.load(a_ptr + at, mask=real, other=0.0), ACTIVATION)
    real = real & (HALF + lane < BLOCK)
    high = gate_size(tl.load(a_ptr + at + HALF, mask=real, other=0.0), ACTIVATION)
    score += tl.where(real, high, 0.0)
    for halving in tl.static_range(HALVINGS):
        score = tl.sum(score.reshape(UNITS, 2, HALF >> (halving + 1)), axis=1)
    return score.reshape(UNITS)


@triton.jit
def select_blocks_kernel(
    a_ptr, offset_ptr, word_ptr, base_ptr, kept_ptr, total_ptr, bad_ptr,
    experts, neurons, words, kept, groups,
    ACTIVATION: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr,
    HALF: tl.constexpr, HALVINGS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One row: grid (N,). BLOCK is B, 2 or more; HALF is 2 to the HALVINGS."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, WORDS)
    if row < tl.load(offset_ptr + experts):
        a_ptr += row * neurons
        number = neurons // BLOCK
        score = _scores(a_ptr, number, BLOCK, UNITS, HALF, HALVINGS, ACTIVATION)
        unit = tl.arange(0, UNITS)
        key = tl.where(unit < number, ordered_bits(score, 31), -1)
        width = number // groups
        chosen = tl.zeros([UNITS], dtype=tl.int32)
        for group in range(groups):
            mine = tl.where(unit // width == group, key, -1)
            kth, limit = bounds_of(mine, unit, kept // BLOCK // groups, 31, INDEX_BITS)
            chosen += is_within(mine, unit, kth, limit)
        place = tl.cumsum(chosen, axis=0) - chosen
        mask = tl.zeros([WORDS], dtype=tl.int32)
        total = tl.full((), 0.0, tl.float32)
        lane = tl.arange(0, 2 * HALF)
        for slot in range(kept // BLOCK):
            first = tl.sum(tl.where((chosen > 0) & (place == slot), unit, 0), axis=0) * BLOCK
            mask |= _below(first + BLOCK - 32 * w) & ~_below(first - 32 * w)
            value = tl.load(a_ptr + first + lane, mask=lane < BLOCK, other=0.0)
            tl.store(kept_ptr + row * kept + slot * BLOCK + lane, value, mask=lane < BLOCK)
            total += tl.sum(tl.where(lane < BLOCK, gate_size(value, ACTIVATION), 0.0), axis=0)
        tl.store(word_ptr + row * words + w, mask, mask=w < words)
        tl.store(base_ptr + row * words + w, word_bases(mask, WORDS).to(tl.int16), mask=w < words)
        tl.store(total_ptr + row, total)
        tl.store(bad_ptr + row, 0)
    else:
        tl.store(word_ptr + row * words + w, tl.zeros([WORDS], tl.int32), mask=w < words)
