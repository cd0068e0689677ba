"""Sparse-dense down product by gathering, for few rows: y_NH[n] = sum_s h[n, s] w_EFH[e_n, j_ns].

Contract: h_NS contiguous and w_EFH neuron-major (arguments.py), of one dtype, expert_N int32,
index_NS any integer type.
A row's S neurons are split over `splits` programs so that one row still fills a GPU; each writes a
float32 partial sum and they are added in order: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mone.kernels.triton.arguments import neurons_apart

PROGRAMS_WANTED = 512  # about four for each of an H100's 132 multiprocessors
MAX_SPLITS = 16


@triton.jit
def sparse_down_kernel(
    h_ptr,
    w_ptr,
    expert_ptr,
    index_ptr,
    partial_ptr,
    kept,
    width,
    hidden,
    share,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_H outputs of one row over `share` kept neurons: grid (N, ceil(H / BLOCK_H), splits)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(2).to(tl.int64)
    expert = tl.load(expert_ptr + row).to(tl.int64)
    last = tl.minimum((split + 1) * share, kept)
    total = tl.zeros([BLOCK_S, BLOCK_H], dtype=tl.float32)
    for start in range(0, share, BLOCK_S):
        s = split * share + start + tl.arange(0, BLOCK_S)
        inside = s < last
        j = tl.load(index_ptr + row * kept + s, mask=inside, other=0).to(tl.int64)
        h = tl.load(h_ptr + row * kept + s, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(
            w_ptr + (expert * width + j)[:, None] * hidden + column[None, :],
            mask=inside[:, None] & (column < hidden)[None, :],
            other=0.0,
        )
        total += h[:, None] * w.to(tl.float32)
    out = partial_ptr + (split * tl.num_programs(0) + row) * hidden + column
    tl.store(out, tl.sum(total, axis=0), mask=column < hidden)


CONFIG = {"BLOCK_S": 16, "BLOCK_H": 256, "num_warps": 4, "num_stages": 4}


def sparse_down(h_NS: Tensor, w_EFH: Tensor, expert_N: Tensor, index_NS: Tensor) -> Tensor:
    """y_NH; see the contract above."""
    rows, kept = h_NS.shape
    hidden = w_EFH.shape[2]
    if not rows:
        return h_NS.new_empty((0, hidden))
    tiles = rows * triton.cdiv(hidden, CONFIG["BLOCK_H"])
    most = min(MAX_SPLITS, triton.cdiv(kept, CONFIG["BLOCK_S"]))
    splits = max(1, min(most, PROGRAMS_WANTED // tiles))
    share = triton.cdiv(kept, splits)
    partial = torch.empty((splits, rows, hidden), dtype=torch.float32, device=h_NS.device)
    sparse_down_kernel[(rows, triton.cdiv(hidden, CONFIG["BLOCK_H"]), splits)](
        h_NS, w_EFH, expert_N, index_NS, partial, kept, neurons_apart(w_EFH), hidden, share,
        **CONFIG,
    )  # fmt: skip
    return partial.sum(dim=0).to(h_NS.dtype)
