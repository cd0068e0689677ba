"""K5: how much each neuron was used: counts and shares of |g| by block, weights, loss, counters.

    statistics     bits and kept a -> sums over stripes of a block's rows   [stripes, B, F]
    gather         the stripes in order -> one row a block; load counters of the experts; weights
                   and the balance loss, where the sums are whole
    weigh          weights and loss, where sums of other ranks were added
A block is the rows of one expert that belong together (moe/neuron_balancer.py); it lies in one or
several chunks of adjacent rows. Sums run in a fixed order: no float atomics, the same bits again.
"""

import triton
import triton.language as tl

from megatron_mone.kernels.triton.device.activations import sigma
from megatron_mone.kernels.triton.device.bits import bits_of, rank_of


@triton.jit
def statistics_kernel(
    word_ptr, base_ptr, kept_ptr, total_ptr, real_ptr, chunk_offset_ptr, block_of_chunk_ptr,
    rows_ptr, count_ptr, share_ptr, ticket_ptr,
    neurons, words, kept, sources, blocks, blocks_per_expert,
    ACTIVATION: tl.constexpr, SHARES: tl.constexpr, SCALE_FREE: tl.constexpr,
    HAS_REAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One stripe of a block, one word of neurons: grid (blocks, words, stripes)."""
    block, word, stripe = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stripes = tl.num_programs(2)
    if block + word + stripe == 0:
        tl.store(ticket_ptr, 0)
    expert = block // blocks_per_expert
    lane = tl.arange(0, 32)
    count = tl.zeros([32], dtype=tl.int32)
    share = tl.zeros([32], dtype=tl.float32)
    found = tl.full((), 0, tl.int32)
    for source in range(sources):
        chunk = expert * sources + source
        if tl.load(block_of_chunk_ptr + chunk) == block:
            first = tl.load(chunk_offset_ptr + chunk)
            end = tl.load(chunk_offset_ptr + chunk + 1)
            for start in range(first + stripe * TILE, end, stripes * TILE):
                i = start + tl.arange(0, TILE)
                real = i < end
                i = i.to(tl.int64)
                if HAS_REAL:
                    real = real & (tl.load(real_ptr + i, mask=real, other=0) != 0)
                found += tl.sum(real.to(tl.int32), axis=0)
                mask = tl.load(word_ptr + i * words + word, mask=real, other=0)[:, None]
                keep = bits_of(mask, lane[None, :])
                count += tl.sum(keep, axis=0)
                if SHARES:
                    base = tl.load(base_ptr + i * words + word, mask=real, other=0).to(tl.int32)
                    place = (i * kept + base)[:, None] + rank_of(mask, lane[None, :])
                    a = tl.load(kept_ptr + place, mask=keep > 0, other=0.0)
                    g = sigma(a.to(tl.float32), ACTIVATION).to(a.dtype).to(tl.float32)
                    size = tl.where(keep > 0, tl.abs(g), 0.0)
                    if SCALE_FREE:
                        total = tl.load(total_ptr + i, mask=real, other=1.0)
                        size *= (1.0 / tl.where(total == 0, 1.0, total))[:, None]
                    share += tl.sum(size, axis=0)
    j = word * 32 + lane
    at = (stripe.to(tl.int64) * blocks + block) * neurons + j
    tl.store(count_ptr + at, count, mask=j < neurons)
    if SHARES:
        tl.store(share_ptr + at, share, mask=j < neurons)
    if word == 0:
        tl.store(rows_ptr + stripe * blocks + block, found)


@triton.jit
def weight_of(share, count, rows, total_neurons, kept, over_experts, ENTROPY: tl.constexpr):
    """What a row's share of each neuron weighs in the loss; rows: of the block, 1 at least."""
    if ENTROPY:
        mean = tl.maximum(share / rows, 1.1754943508222875e-38)
        slope = 1.0 + tl.log(mean) / tl.log(tl.maximum(total_neurons, 2).to(tl.float32))
    else:
        slope = count * (total_neurons.to(tl.float32) / kept.to(tl.float32)) / rows
    return slope * over_experts / rows


@triton.jit
def add_parts(
    part, place, parts, part_ptr, ticket_ptr, loss_ptr, tally_ptr, tally_scale,
    PARTS: tl.constexpr, TALLY: tl.constexpr,
):  # fmt: skip
    """Leave one part of the loss; the last program to come here adds all of them, in order, and
    their sum, scaled, to what is logged."""
    tl.store(part_ptr + place, part)
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1) == parts - 1:
        lane = tl.arange(0, PARTS)
        found = tl.load(part_ptr + lane, mask=lane < parts, other=0.0, volatile=True)
        loss = tl.sum(found, axis=0)
        tl.store(loss_ptr, loss)
        if TALLY:
            tl.store(tally_ptr, tl.load(tally_ptr) + loss * tally_scale)
        tl.store(ticket_ptr, 0)


@triton.jit
def gather_kernel(
    rows_ptr, count_ptr, share_ptr, sum_ptr, ticket_ptr, load_ptr, load_rows_ptr,
    weight_ptr, part_ptr, loss_ptr, tally_ptr,
    neurons, stripes, blocks, blocks_per_expert, total_neurons, kept, over_experts, tally_scale,
    SHARES: tl.constexpr, LOADS: tl.constexpr, WEIGHTS: tl.constexpr, ENTROPY: tl.constexpr,
    PARTS: tl.constexpr, TALLY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE neurons of an expert: grid (E, ceil(F / TILE)). A block's sums: rows, counts, shares.

    WEIGHTS: "make" them and the loss; of "ready" ones make the loss; "none".
    """
    expert, piece = tl.program_id(0), tl.program_id(1)
    j = piece * TILE + tl.arange(0, TILE)
    inside = j < neurons
    width = tl.cast(1 + 2 * neurons, tl.int64)
    load = tl.zeros([TILE], dtype=tl.int64)
    load_rows = tl.full((), 0, tl.int64)
    part = tl.zeros([TILE], dtype=tl.float32)
    for within in range(blocks_per_expert):
        block = expert * blocks_per_expert + within
        count = tl.zeros([TILE], dtype=tl.int32)
        share = tl.zeros([TILE], dtype=tl.float32)
        found = tl.full((), 0, tl.int32)
        for stripe in range(stripes):
            row = stripe * blocks + block
            at = row.to(tl.int64) * neurons + j
            count += tl.load(count_ptr + at, mask=inside, other=0)
            if SHARES:
                share += tl.load(share_ptr + at, mask=inside, other=0.0)
            found += tl.load(rows_ptr + row)
        out = sum_ptr + block * width
        tl.store(out + 1 + j, count.to(tl.float32), mask=inside)
        tl.store(out + 1 + neurons + j, share, mask=inside)
        if piece == 0:
            tl.store(out, found.to(tl.float32))
        load += count.to(tl.int64)
        load_rows += found.to(tl.int64)
        if WEIGHTS != "none":
            at = weight_ptr + block.to(tl.int64) * neurons + j
            if WEIGHTS == "ready":
                weight = tl.load(at, mask=inside, other=0.0)
            else:
                rows = tl.maximum(found.to(tl.float32), 1.0)
                weight = weight_of(
                    share, count.to(tl.float32), rows, total_neurons, kept, over_experts, ENTROPY
                )
                tl.store(at, weight, mask=inside)
            part += tl.where(inside, weight * share, 0.0)
    if LOADS:
        at = load_ptr + expert.to(tl.int64) * neurons + j
        tl.store(at, tl.load(at, mask=inside, other=0) + load, mask=inside)
        if piece == 0:
            tl.store(load_rows_ptr + expert, tl.load(load_rows_ptr + expert) + load_rows)
    if WEIGHTS != "none":
        pieces = tl.num_programs(1)
        add_parts(
            tl.sum(part, axis=0), expert * pieces + piece, tl.num_programs(0) * pieces,
            part_ptr, ticket_ptr, loss_ptr, tally_ptr, tally_scale, PARTS, TALLY,
        )  # fmt: skip


@triton.jit
def weigh_kernel(
    whole_ptr, sum_ptr, weight_ptr, part_ptr, ticket_ptr, loss_ptr, tally_ptr,
    neurons, blocks, total_neurons, kept, over_experts, tally_scale,
    ENTROPY: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, TALLY: tl.constexpr,
):  # fmt: skip
    """One block: grid (blocks,). Weights of the whole sums; the loss of this rank's own."""
    block = tl.program_id(0)
    width = tl.cast(1 + 2 * neurons, tl.int64)
    whole = whole_ptr + block * width
    rows = tl.maximum(tl.load(whole), 1.0)
    part = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, neurons, TILE):
        j = start + tl.arange(0, TILE)
        inside = j < neurons
        count = tl.load(whole + 1 + j, mask=inside, other=0.0)
        share = tl.load(whole + 1 + neurons + j, mask=inside, other=0.0)
        weight = weight_of(share, count, rows, total_neurons, kept, over_experts, ENTROPY)
        tl.store(weight_ptr + block.to(tl.int64) * neurons + j, weight, mask=inside)
        own = tl.load(sum_ptr + block * width + 1 + neurons + j, mask=inside, other=0.0)
        part += tl.where(inside, weight * own, 0.0)
    add_parts(
        tl.sum(part, axis=0), block, blocks, part_ptr, ticket_ptr, loss_ptr, tally_ptr, tally_scale,
        PARTS, TALLY,
    )  # fmt: skip


@triton.jit
def note_bad_kernel(bad_ptr, p_ptr, offset_ptr, first_ptr, call, TILE: tl.constexpr):
    """An expert's first forward pass with rows that are bad or marked (p < 0): grid (E,)."""
    expert = tl.program_id(0)
    first, end = tl.load(offset_ptr + expert), tl.load(offset_ptr + expert + 1)
    bad = tl.full((), 0, tl.int64)
    marked = tl.full((), 0, tl.int64)
    for start in range(first, end, TILE):
        i = start + tl.arange(0, TILE)
        is_marked = tl.load(p_ptr + i, mask=i < end, other=0.0) < 0
        is_bad = (tl.load(bad_ptr + i, mask=i < end, other=0) > 0) | is_marked
        bad += tl.sum(is_bad.to(tl.int64), axis=0)
        marked += tl.sum(is_marked.to(tl.int64), axis=0)
    first_ptr += expert * 3
    if (bad > 0) & (tl.load(first_ptr + 1) == 0):
        tl.store(first_ptr, call)
        tl.store(first_ptr + 1, bad + (marked << 32))
        tl.store(first_ptr + 2, (end - first).to(tl.int64))
