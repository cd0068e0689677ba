"""Block-sparse weight gradient: dW[block] = sum over rows that keep it of v_NQB[n, q]^T x_NH[n].

Contract: v [N, Q B] and x_NH [N, H] contiguous, of one dtype; blocks of B = 16, 32, 64 or 128
neurons. The output is [E, F, H] in x's dtype, float32 sums, zero for blocks that no row keeps. A
program owns its outputs and adds the rows in order: no atomics, the same bits on every run. It
serves dW_gate (da, x), dW_up (du, x) and dW_down (h, dy), all neuron-major.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_mone.kernels.triton.block_index import BlockIndex


@triton.jit
def block_weight_grad_kernel(
    v_ptr,
    x_ptr,
    dw_ptr,
    pair_ptr,
    offset_ptr,
    slots,
    hidden,
    BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_H: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block's TILE_H columns, computed transposed so that H fills the GEMM's long side.

    Grid (Z, ceil(H / TILE_H)).
    """
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(offset_ptr + segment)
    last = tl.load(offset_ptr + segment + 1)
    h = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    real = h < hidden
    j = tl.arange(0, BLOCK)
    total = tl.zeros([TILE_H, BLOCK], dtype=tl.float32)
    for start in range(first, last, TILE_M):
        place = start + tl.arange(0, TILE_M)
        inside = place < last
        pair = tl.load(pair_ptr + place, mask=inside, other=0)
        x_at = (pair // slots).to(tl.int64)[:, None] * hidden + h[None, :]
        v_at = pair.to(tl.int64)[:, None] * BLOCK + j[None, :]
        x = tl.load(x_ptr + x_at, mask=inside[:, None] & real[None, :], other=0.0)
        v = tl.load(v_ptr + v_at, mask=inside[:, None], other=0.0)
        if UPCAST:
            x, v = x.to(tl.float32), v.to(tl.float32)
        total = tl.dot(tl.trans(x), v, total, input_precision="ieee")
    out = dw_ptr + (segment * BLOCK + j)[None, :] * hidden + h[:, None]
    tl.store(out, total, mask=real[:, None])


def config(block: int) -> dict[str, int]:
    """Launch parameters for blocks of `block` neurons."""
    wide = block >= 64
    columns, warps = (128, 8) if wide else (64, 4)
    return {"TILE_M": 64, "TILE_H": columns, "num_warps": warps, "num_stages": 3}


def block_weight_grad(v_NS: Tensor, x_NH: Tensor, index: BlockIndex, neurons: int) -> Tensor:
    """dW [E, F, H]; see the contract above. `neurons` is F."""
    hidden = x_NH.shape[1]
    dw_EFH = x_NH.new_empty((index.segments * index.block // neurons, neurons, hidden))
    launch = config(index.block)
    block_weight_grad_kernel[(index.segments, triton.cdiv(hidden, launch["TILE_H"]))](
        v_NS, x_NH, dw_EFH, index.pairs_P, index.offsets_Z1, index.slots, hidden,
        BLOCK=index.block, UPCAST=triton.knobs.runtime.interpret, **launch,
    )  # fmt: skip
    return dw_EFH
