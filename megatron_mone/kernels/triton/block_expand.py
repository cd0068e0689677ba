"""Block-sparse down product: y_NH[n] = sum over kept blocks q of v_NQB[n, q] W[block].

Contract: v [N, Q B] and w_EFH contiguous, of one dtype; blocks of B = 16, 32, 64 or 128 neurons. An
optional second pair (v2, w2) is added in the same sums: dx = da W_gate + du W_up. Each pair (row,
slot) writes its own float32 row of H partial sums, added over the slots in order afterwards: no
atomics, the same bits on every run, and a workspace of N Q H floats (so use wide blocks).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mone.kernels.triton.block_index import TILE_ROWS, BlockIndex


@triton.jit
def _product(v_ptr, w_ptr, v_at, w_at, v_mask, w_mask, total, UPCAST: tl.constexpr):
    """total + v W for one tile; v is [TILE_M, BLOCK], W is [BLOCK, TILE_N]."""
    v = tl.load(v_ptr + v_at, mask=v_mask, other=0.0)
    w = tl.load(w_ptr + w_at, mask=w_mask, other=0.0)
    if UPCAST:
        v, w = v.to(tl.float32), w.to(tl.float32)
    return tl.dot(v, w, total, input_precision="ieee")


@triton.jit
def block_expand_kernel(
    v_ptr,
    w_ptr,
    v2_ptr,
    w2_ptr,
    partial_ptr,
    pair_ptr,
    offset_ptr,
    tile_segment_ptr,
    tile_first_ptr,
    segments,
    hidden,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of pairs by TILE_N outputs: grid (T, ceil(H / TILE_N))."""
    segment = tl.load(tile_segment_ptr + tl.program_id(0)).to(tl.int64)
    if segment >= segments:
        return
    place = tl.load(tile_first_ptr + tl.program_id(0)) + tl.arange(0, TILE_M)
    inside = (place < tl.load(offset_ptr + segment + 1))[:, None]
    pair = tl.load(pair_ptr + place, mask=place < tl.load(offset_ptr + segment + 1), other=0)
    pair = pair.to(tl.int64)[:, None]
    column = (tl.program_id(1) * TILE_N + tl.arange(0, TILE_N))[None, :]
    j = tl.arange(0, BLOCK)
    v_at = pair * BLOCK + j[None, :]
    w_at = (segment * BLOCK + j)[:, None] * hidden + column
    total = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    real = column < hidden
    total = _product(v_ptr, w_ptr, v_at, w_at, inside, real, total, UPCAST)
    if TWO:
        total = _product(v2_ptr, w2_ptr, v_at, w_at, inside, real, total, UPCAST)
    tl.store(partial_ptr + pair * hidden + column, total, mask=inside & real)


def config(block: int) -> dict[str, int]:
    """Launch parameters for blocks of `block` neurons."""
    warps = 8 if block >= 64 else 4
    return {"TILE_M": TILE_ROWS, "TILE_N": 128, "num_warps": warps, "num_stages": 2}


def block_expand(
    v_NS: Tensor, w_EFH: Tensor, index: BlockIndex, second: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """y_NH in v's dtype; `second` is (v2, w2). See the contract above."""
    rows, hidden = v_NS.shape[0], w_EFH.shape[2]
    size = (rows, index.slots, hidden)
    partial_NQH = torch.empty(size, dtype=torch.float32, device=v_NS.device)
    if index.tiles:
        launch = config(index.block)
        v2_NS, w2_EFH = second or (v_NS, w_EFH)
        block_expand_kernel[(index.tiles, triton.cdiv(hidden, launch["TILE_N"]))](
            v_NS, w_EFH, v2_NS, w2_EFH, partial_NQH, index.pairs_P, index.offsets_Z1,
            index.tile_segment_T, index.tile_first_T, index.segments, hidden,
            TWO=second is not None, BLOCK=index.block, UPCAST=triton.knobs.runtime.interpret,
            **launch,
        )  # fmt: skip
    return partial_NQH.sum(dim=1).to(v_NS.dtype)
