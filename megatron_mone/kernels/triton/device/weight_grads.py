"""K8: weight gradients, grouped: out[e] (+)= v^T x over the rows of expert e.

v is [N, F] and x [N, H]; out is [E, F, H], experts any stride apart, and may be Megatron's float32
main_grad (ADDS). Rows are the inner size, so an expert's last step reaches rows of the next one, or
past the last: those are set to 0 in both operands, as 0 times whatever they hold may be NaN.
By segments (segment_map.py) an expert stands for one, rows for places of pairs: v is [P, B] in that
order, each row of x is read from where its pair has it, out are a segment's rows of [E, F, H].
"""

import triton
import triton.language as tl

from megatron_mone.kernels.triton.device.tiles import dot, load, matrix, segment_of


@triton.jit
def _gathered(
    x_ptr, order_ptr, first, end, column, hidden, slots,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of x: the rows of the pairs in the places from `first`, zeros from `end`."""
    i = first + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    row = tl.load(order_ptr + i, mask=i < end, other=0) // slots
    at = row.to(tl.int64)[:, None] * hidden + j[None, :]
    return tl.load(x_ptr + at, mask=(i < end)[:, None] & (j < hidden)[None, :], other=0.0)


@triton.jit
def weight_grad_kernel(
    v_ptr, x_ptr, out_ptr, order_ptr, offset_ptr,
    rows, neurons, hidden, units, slots, out_stride, experts,
    ADDS: tl.constexpr, ORDERED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Persistent over experts and tiles of [F, H]: grid (any,)."""
    v = matrix(v_ptr, rows, neurons, neurons, TILE_K, TILE_M, TMA)
    if not ORDERED:
        x = matrix(x_ptr, rows, hidden, hidden, TILE_K, TILE_N, TMA)
    across, down = tl.cdiv(hidden, TILE_N), tl.cdiv(neurons, TILE_M)
    for index in range(tl.program_id(0), experts * across * down, tl.num_programs(0)):
        expert = index // (across * down)
        neuron = index % down * TILE_M
        column = index // down % across * TILE_N
        start = tl.load(offset_ptr + expert)
        end = tl.load(offset_ptr + expert + 1)
        whole = start + (end - start) // TILE_K * TILE_K
        total = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
        for k in range(start, whole, TILE_K):
            left = load(v, k, neuron, rows, neurons, neurons, TILE_K, TILE_M, TMA)
            if ORDERED:
                right = _gathered(x_ptr, order_ptr, k, end, column, hidden, slots, TILE_K, TILE_N)
            else:
                right = load(x, k, column, rows, hidden, hidden, TILE_K, TILE_N, TMA)
            total = dot(left.T, right, total, UPCAST)
        if whole < end:
            real = (whole + tl.arange(0, TILE_K) < end)[:, None]
            left = load(v, whole, neuron, rows, neurons, neurons, TILE_K, TILE_M, TMA)
            if ORDERED:
                right = _gathered(
                    x_ptr, order_ptr, whole, end, column, hidden, slots, TILE_K, TILE_N
                )
            else:
                right = load(x, whole, column, rows, hidden, hidden, TILE_K, TILE_N, TMA)
                right = tl.where(real, right, 0.0)
            left = tl.where(real, left, 0.0)
            total = dot(left.T, right, total, UPCAST)
        i = neuron + tl.arange(0, TILE_M)
        j = column + tl.arange(0, TILE_N)
        out = segment_of(out_ptr, expert, units, neurons, hidden, out_stride)
        out += i.to(tl.int64)[:, None] * hidden + j[None, :]
        inside = (i < neurons)[:, None] & (j < hidden)[None, :]
        if ADDS:
            total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)
