"""Sampled product by gathering, for few rows: u_NS[n, s] = <x_NH[n], w_EFH[e_n, index_NS[n, s]]>.

Contract: x_NH contiguous and w_EFH neuron-major (arguments.py), of one dtype, expert_N int32,
index_NS any integer type.
Sums in float32; the output is in x's dtype. Weights are read once per row that keeps them, so this
pays only while an expert has about F / S rows or fewer (decoding): see triton_limits.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_mone.kernels.triton.arguments import neurons_apart


@triton.jit
def sampled_up_kernel(
    x_ptr,
    w_ptr,
    expert_ptr,
    index_ptr,
    u_ptr,
    kept,
    width,
    hidden,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_S kept neurons of one row: grid (N, ceil(S / BLOCK_S))."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = s < kept
    j = tl.load(index_ptr + row * kept + s, mask=inside, other=0).to(tl.int64)
    neuron = tl.load(expert_ptr + row).to(tl.int64) * width + j
    total = tl.zeros([BLOCK_S, BLOCK_H], dtype=tl.float32)
    for start in range(0, hidden, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + row * hidden + h, mask=h < hidden, other=0.0).to(tl.float32)
        w = tl.load(
            w_ptr + neuron[:, None] * hidden + h[None, :],
            mask=inside[:, None] & (h < hidden)[None, :],
            other=0.0,
        )
        total += x[None, :] * w.to(tl.float32)
    tl.store(u_ptr + row * kept + s, tl.sum(total, axis=1), mask=inside)


CONFIG = {"BLOCK_S": 16, "BLOCK_H": 256, "num_warps": 4, "num_stages": 4}


def sampled_up(x_NH: Tensor, w_EFH: Tensor, expert_N: Tensor, index_NS: Tensor) -> Tensor:
    """u_NS; see the contract above."""
    rows, kept = index_NS.shape
    u_NS = x_NH.new_empty((rows, kept))
    if rows:
        sampled_up_kernel[(rows, triton.cdiv(kept, CONFIG["BLOCK_S"]))](
            x_NH, w_EFH, expert_N, index_NS, u_NS, kept, neurons_apart(w_EFH), x_NH.shape[1],
            **CONFIG,
        )  # fmt: skip
    return u_NS
