"""The masked gated activation on kept neurons, forward and backward, with dp reduced in order.

Contract: a_NS, u_NS hold the kept pre-activations (x's dtype), p_N any float, index_NS their
neurons. With S kept of F neurons, wide operands (up, h, dh, da, du) are either compact [N, S] or,
when `scattered`, dense [N, F] rows addressed through index_NS; dense outputs are zero elsewhere.
    forward:   g = sigma(a)      h = p g u
    backward:  du = p g dh       da = (p u dh + dgate) sigma'(a)
               dp = sum over kept of g u dh, in float32
dh is dy W_down, before p. Everything is recomputed from a and u in float32, but g is rounded to x's
dtype first, as the reference's is. A program owns a row: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mone.kernels.triton.activations import sigma, sigma_prime


@triton.jit
def _where(index_ptr, row, k, inside, width, SCATTERED: tl.constexpr):
    """Offsets of kept entries in a wide operand."""
    at = k
    if SCATTERED:
        at = row * width + tl.load(index_ptr + k, mask=inside, other=0).to(tl.int64)
    return at


@triton.jit
def gate_forward_kernel(
    a_ptr,
    up_ptr,
    p_ptr,
    index_ptr,
    gate_ptr,
    u_ptr,
    h_ptr,
    kept,
    width,
    ACTIVATION: tl.constexpr,
    SCATTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(p_ptr + row).to(tl.float32)
    for start in range(0, kept, BLOCK):
        s = start + tl.arange(0, BLOCK)
        inside = s < kept
        k = row * kept + s
        at = _where(index_ptr, row, k, inside, width, SCATTERED)
        a = tl.load(a_ptr + k, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + at, mask=inside, other=0.0)
        gate = sigma(a, ACTIVATION).to(gate_ptr.dtype.element_ty)
        tl.store(gate_ptr + k, gate, mask=inside)
        if SCATTERED:
            tl.store(u_ptr + k, u, mask=inside)
        tl.store(h_ptr + at, p * gate.to(tl.float32) * u.to(tl.float32), mask=inside)


@triton.jit
def gate_backward_kernel(
    a_ptr,
    u_ptr,
    p_ptr,
    index_ptr,
    dh_ptr,
    dgate_ptr,
    da_ptr,
    du_ptr,
    h_ptr,
    dp_ptr,
    kept,
    width,
    ACTIVATION: tl.constexpr,
    SCATTERED: tl.constexpr,
    HAS_DGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(p_ptr + row).to(tl.float32)
    dp = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, kept, BLOCK):
        s = start + tl.arange(0, BLOCK)
        inside = s < kept
        k = row * kept + s
        at = _where(index_ptr, row, k, inside, width, SCATTERED)
        a = tl.load(a_ptr + k, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + k, mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = sigma(a, ACTIVATION).to(a_ptr.dtype.element_ty).to(tl.float32)
        dg = p * u * dh
        if HAS_DGATE:
            dg += tl.load(dgate_ptr + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(da_ptr + at, dg * sigma_prime(a, ACTIVATION), mask=inside)
        tl.store(du_ptr + at, p * g * dh, mask=inside)
        tl.store(h_ptr + at, p * g * u, mask=inside)
        dp += tl.where(inside, g * u * dh, 0.0)
    tl.store(dp_ptr + row, tl.sum(dp, axis=0))


def config(kept: int) -> dict[str, int]:
    """Launch parameters for rows of `kept` entries: at most 8 values a thread."""
    block = min(max(triton.next_power_of_2(kept), 32), 1024)
    return {"BLOCK": block, "num_warps": max(block // 256, 1)}


def gate_forward(
    a_NS: Tensor,
    up: Tensor,
    p_N: Tensor,
    index_NS: Tensor,
    *,
    activation: str,
    scattered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gate_NS, u_NS, h): `up` and h are [N, F] when scattered, else [N, S]."""
    gate_NS, h = torch.empty_like(a_NS), (torch.zeros_like if scattered else torch.empty_like)(up)
    u_NS = torch.empty_like(a_NS) if scattered else up
    rows, kept = a_NS.shape
    if a_NS.numel():
        gate_forward_kernel[(rows,)](
            a_NS, up, p_N, index_NS, gate_NS, u_NS, h, kept, up.shape[1],
            ACTIVATION=activation, SCATTERED=scattered, **config(kept),
        )  # fmt: skip
    return gate_NS, u_NS, h


def gate_backward(
    a_NS: Tensor,
    u_NS: Tensor,
    p_N: Tensor,
    index_NS: Tensor,
    dh: Tensor,
    dgate_NS: Tensor | None,
    *,
    activation: str,
    scattered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(da, du, h, dp_N float32): dh, da, du and h are [N, F] when scattered, else [N, S]."""
    new = torch.zeros_like if scattered else torch.empty_like
    da, du, h = new(dh), new(dh), new(dh)
    rows, kept = a_NS.shape
    dp_N = torch.zeros(rows, dtype=torch.float32, device=a_NS.device)
    if a_NS.numel():
        gate_backward_kernel[(rows,)](
            a_NS, u_NS, p_N, index_NS, dh, a_NS if dgate_NS is None else dgate_NS.contiguous(),
            da, du, h, dp_N, kept, dh.shape[1], ACTIVATION=activation, SCATTERED=scattered,
            HAS_DGATE=dgate_NS is not None, **config(kept),
        )  # fmt: skip
    return da, du, h, dp_N
