"""What a traced operator is to the roofline: a product, attention, a selection, or bytes to move.

Products are known by their operations and shapes, the rest by name; an operator that is none of
them moves its bytes. Touches nothing.
Shapes: N routed rows, E local experts, H hidden, F neurons of an expert, K kept entries of [N, F].
"""

from __future__ import annotations

import math

from megatron_mone.planning.cost.roofline import Operation
from megatron_mone.planning.tracing.trace import Op

DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}
SELECTIONS = ("mone.select",)


def operation(op: Op) -> Operation:
    """One of the equal operators that `op` stands for.

    Raises:
        ValueError: a product of a type that no device has a peak for.
    """
    moved = float(op.bytes_read + op.bytes_written)
    if not op.flops:
        kind = "selection" if op.name in SELECTIONS else "memory"
        return Operation(kind, "bf16", 0.0, moved)
    dtype = DTYPES.get(op.dtype)
    if dtype is None:
        raise ValueError(f"{op.name} multiplies in {op.dtype}: no device has a peak for it")
    flops = float(op.flops)
    if op.name.startswith("fused.attention"):
        queries, keys, size = _attention(op)
        return Operation("attention", dtype, flops, moved, queries, keys, size)
    if op.name.startswith("mone.") or op.name.startswith("fused.grouped_gemm"):
        rows, columns, depth, kept = _grouped(op)
        return Operation("grouped_gemm", dtype, flops, moved, rows, columns, depth, kept)
    rows, columns = _matrix(op)
    depth = max(1, round(flops / (2.0 * rows * columns)))
    return Operation("gemm", dtype, flops, moved, rows, columns, depth)


def _matrix(op: Op) -> tuple[float, int]:
    """[rows, columns] of a product's result; matrices of a batch share the device, row by row."""
    shape = op.outputs[0]
    return float(max(1, math.prod(shape[:-1]))), max(1, shape[-1] if shape else 1)


def _attention(op: Op) -> tuple[float, int, int]:
    """(queries, keys, head size) of inputs q [s, b, n, d], k [t, b, m, d], ...."""
    queries, keys = op.inputs[0], op.inputs[1]
    return float(queries[0]), keys[0], queries[-1]


def _grouped(op: Op) -> tuple[float, int, int, float]:
    """(rows of one group, columns, depth, kept share) of products with weights [E, ., .].

    A weight gradient's result is the one with three dimensions, and what it sums over are the rows.
    """
    stacked = [shape for shape in op.inputs if len(shape) == 3]
    if not stacked:  # a weight gradient: [N, K] and [N, C] -> [E, K, C]
        groups, depth, columns = next(shape for shape in op.outputs if len(shape) == 3)
        return float(depth), columns, max(1, op.inputs[0][0] // groups), 1.0
    groups, first, second = stacked[0]
    rows = max(1.0, op.inputs[0][0] / groups)
    if op.name.startswith("mone.") and op.name != "mone.gate":
        neurons, hidden = first, second
        whole = 2.0 * op.inputs[0][0] * neurons * hidden
        products = 2 if op.name == "mone.up_down" else 6
        kept = min(1.0, max(1e-6, op.flops / (products * whole))) if whole else 1.0
        return rows, neurons, hidden, kept
    width = op.outputs[0][-1]
    depth = op.inputs[0][-1]
    return rows, max(1, width), max(1, depth), 1.0
