"""Block-sparse sampled product: v_NQB[n, q] = x_NH[n] W[block]^T for the blocks that row n keeps.

Contract: x_NH [N, H] and w_EFH contiguous, of one dtype (bfloat16 or float32); B = 16, 32, 64 or
128 adjacent neurons a block. One program multiplies the gathered rows of one tile (pairs that keep
the same block) with that block's weights on tensor cores, in float32 sums. It serves up (x, w_up),
the kept pre-activations (x, w_gate) and the gradient of h (dy, w_down).
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_mone.kernels.triton.block_index import TILE_ROWS, BlockIndex


@triton.jit
def block_sampled_kernel(
    x_ptr,
    w_ptr,
    v_ptr,
    pair_ptr,
    offset_ptr,
    tile_segment_ptr,
    tile_first_ptr,
    segments,
    slots,
    hidden,
    BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_H: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of pairs: grid (T,)."""
    segment = tl.load(tile_segment_ptr + tl.program_id(0)).to(tl.int64)
    if segment >= segments:
        return
    place = tl.load(tile_first_ptr + tl.program_id(0)) + tl.arange(0, TILE_M)
    inside = place < tl.load(offset_ptr + segment + 1)
    pair = tl.load(pair_ptr + place, mask=inside, other=0)
    x_at = x_ptr + (pair // slots).to(tl.int64)[:, None] * hidden
    j = tl.arange(0, BLOCK)
    w_at = w_ptr + (segment * BLOCK + j)[None, :] * hidden
    total = tl.zeros([TILE_M, BLOCK], dtype=tl.float32)
    for start in range(0, hidden, TILE_H):
        h = start + tl.arange(0, TILE_H)
        real = h < hidden
        x = tl.load(x_at + h[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        w = tl.load(w_at + h[:, None], mask=real[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    out = v_ptr + pair.to(tl.int64)[:, None] * BLOCK + j[None, :]
    tl.store(out, total, mask=inside[:, None])


def config(block: int) -> dict[str, int]:
    """Launch parameters for blocks of `block` neurons."""
    return {"TILE_M": TILE_ROWS, "TILE_H": 64, "num_warps": 4, "num_stages": 4}


def block_sampled(x_NH: Tensor, w_EFH: Tensor, index: BlockIndex) -> Tensor:
    """v, [N, Q B] in x's dtype; see the contract above."""
    rows, hidden = x_NH.shape
    v_NS = x_NH.new_empty((rows, index.slots * index.block))
    if index.tiles:
        block_sampled_kernel[(index.tiles,)](
            x_NH, w_EFH, v_NS, index.pairs_P, index.offsets_Z1, index.tile_segment_T,
            index.tile_first_T, index.segments, index.slots, hidden, BLOCK=index.block,
            UPCAST=triton.knobs.runtime.interpret, **config(index.block),
        )  # fmt: skip
    return v_NS
