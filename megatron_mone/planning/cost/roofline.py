"""Seconds of one operation on a device: operations over peak, or bytes over bandwidth, and launch.

    seconds = max(flops / (peak x compute efficiency), bytes / (bandwidth x memory efficiency))
              + launch

A traced operator is a product, attention, a selection, or bytes to move: products are known by
their operations and shapes, the rest by name; an operator that is none of them moves its bytes.
Efficiencies are smooth curves of the shape, one set of parameters per class of operation.
DEFAULTS are assumptions, not measurements; phase_fit.py fits them. Touches nothing.
Shapes: a product is [rows, depth] x [depth, columns], a grouped one that for each of its groups;
N routed rows, E local experts, H hidden, F neurons of an expert, K kept entries of [N, F].
"""

import math
from dataclasses import dataclass

from megatron_mone.common.device import Device
from megatron_mone.common.spelling import nearest_name
from megatron_mone.planning.tracing.trace import Op

WIDE_HEAD = 128
"""The head size that attention kernels are made for."""
SHARES = ("peak_share", "bandwidth_share")
SCALES = (
    *("half_rows", "half_depth", "half_bytes", "launch", "sparse_loss", "half_grid", "wide_loss"),
)
"""Parameters of a curve in (0, 1], and from 0 on."""


@dataclass(frozen=True)
class Operation:
    """What a kernel does, as the roofline sees it.

    Attributes:
        kind: of DEFAULTS.
        dtype: of device.DTYPES, whose peak counts.
        flops: executed, a multiply-add being two.
        bytes: of device memory read and written.
        rows: of one product: tokens, rows of one expert (the mean over those that have any), or
            a sequence's queries for attention.
        columns: of one product; a sequence's keys for attention.
        depth: what is summed over; the head size for attention.
        kept: share of a sparse product's entries that are computed; 1 is dense.
        heads: of attention, all samples' together; rows of each run beside each other.
    """

    kind: str
    dtype: str
    flops: float
    bytes: float
    rows: float = 1.0
    columns: int = 1
    depth: int = 1
    kept: float = 1.0
    heads: int = 1

    def __post_init__(self) -> None:
        if self.kind not in DEFAULTS:
            raise ValueError(
                f"operation kind {self.kind!r} is unknown"
                f"{nearest_name(self.kind, list(DEFAULTS))}; choose one of {', '.join(DEFAULTS)}"
            )
        for name in ("flops", "bytes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be finite and 0 or more")
        for name in ("rows", "columns", "depth", "heads"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be finite and above 0")
        if not 0 < self.kept <= 1:
            raise ValueError(f"kept = {self.kept} must be in (0, 1]; 1 is dense")


@dataclass(frozen=True)
class Curve:
    """How near to its peaks a device comes in one class of operations.

    Attributes:
        peak_share: of the dense peak, for large shapes, in (0, 1].
        half_rows: rows at which half of that is reached. Half a row tile is what rounding rows up
            to tiles costs on average; launching too few tiles for all multiprocessors adds to it.
        half_depth: likewise of the depth: filling and draining a tile's pipeline.
        column_tile: columns are rounded up to a multiple of it.
        sparse_loss: a product of which a share r is kept has r ** sparse_loss of the dense
            efficiency; 0 loses nothing.
        bandwidth_share: of the memory bandwidth, for large transfers, in (0, 1].
        half_bytes: bytes at which half of that is reached.
        launch: seconds before a kernel starts that no other hides.
        half_grid: rows x heads at which half of that is reached: fewer leave multiprocessors idle.
        wide_loss: attention whose head size d is above WIDE_HEAD has (WIDE_HEAD / d) ** wide_loss
            of the efficiency; 0 loses nothing.
    """

    peak_share: float
    half_rows: float
    half_depth: float
    column_tile: int
    sparse_loss: float
    bandwidth_share: float
    half_bytes: float
    launch: float
    half_grid: float = 0.0
    wide_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in SHARES:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} of a curve must be in (0, 1]")
        for name in SCALES:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} of a curve must be 0 or more")
        if self.column_tile < 1:
            raise ValueError(f"column_tile = {self.column_tile} of a curve must be 1 or more")

    def compute_efficiency(self, operation: Operation) -> float:
        """Share of the dense peak, in (0, 1]; rises with rows and depth."""
        tiles = math.ceil(operation.columns / self.column_tile)
        grid = operation.rows * operation.heads
        return (
            self.peak_share
            * grid
            / (grid + self.half_grid)
            * operation.rows
            / (operation.rows + self.half_rows)
            * operation.depth
            / (operation.depth + self.half_depth)
            * operation.columns
            / (tiles * self.column_tile)
            * operation.kept**self.sparse_loss
            * min(1.0, WIDE_HEAD / operation.depth) ** self.wide_loss
        )

    def memory_efficiency(self, operation: Operation) -> float:
        """Share of the memory bandwidth, in (0, 1]; rises with the bytes, which are above 0."""
        return self.bandwidth_share * operation.bytes / (operation.bytes + self.half_bytes)

    def seconds(self, operation: Operation, device: Device) -> float:
        """Of one kernel; an operation that does and moves nothing launches nothing.

        Raises:
            ValueError: the device has no peak for the operation's dtype.
        """
        if not operation.flops and not operation.bytes:
            return 0.0
        computing = 0.0
        if operation.flops:
            peak = device.peak(operation.dtype) * self.compute_efficiency(operation)
            computing = operation.flops / peak
        moving = 0.0
        if operation.bytes:  # bytes / (bandwidth x memory_efficiency)
            share = device.memory_bandwidth * self.bandwidth_share
            moving = (operation.bytes + self.half_bytes) / share
        return max(computing, moving) + self.launch


# Assumptions: a large product reaches 0.8 of a data sheet's peak and a large copy 0.9 of the
# bandwidth, tiles are 128 wide, and a launch that nothing hides takes 3 us. Only a fit to
# measurements makes them more. Rows that are moved by index reach 0.75 of what a copy does: on B200
# that is what was published (tests/published/kernels).
DEFAULTS = {
    "gemm": Curve(0.80, 128.0, 128.0, 64, 0.0, 0.9, 1e6, 3e-6),
    "grouped_gemm": Curve(0.75, 128.0, 128.0, 64, 0.5, 0.85, 2e6, 5e-6),
    "grouped_wgrad": Curve(0.75, 128.0, 128.0, 64, 0.5, 0.85, 2e6, 5e-6),
    "attention": Curve(0.60, 256.0, 16.0, 64, 0.0, 0.8, 1e6, 5e-6),
    "attention_backward": Curve(0.55, 256.0, 16.0, 64, 0.0, 0.8, 1e6, 5e-6),
    "memory": Curve(1.0, 0.0, 0.0, 1, 0.0, 0.9, 2e6, 3e-6),
    "permutation": Curve(1.0, 0.0, 0.0, 1, 0.0, 0.68, 2e6, 3e-6),
    "selection": Curve(1.0, 0.0, 0.0, 1, 0.0, 0.6, 2e6, 5e-6),
}


DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}
SELECTIONS = ("mone.select", "mone.select_wide", "mone.select_blocks")
PERMUTATIONS = ("fused.permute", "fused.unpermute", "fused.sort_chunks")
"""What names of fused kernels begin with that move rows by index."""


WEIGHT_GRADIENTS = ("mone.weight_grad", "fused.grouped_gemm_wgrad")
"""Of routed experts."""

GPU_PRODUCTS = {
    "mone.gate_product": 0,
    "mone.up_product": 1,
    "mone.up_segments": 1,
    "mone.dh_product": 0,
    "mone.dh_segments": 0,
    "mone.hidden_product": None,
    "mone.weight_grad": None,
    "mone.decode_gate": 0,
    "mone.decode_up": 0,
    "mone.decode_down": None,
}
"""Kernels of MoNE's experts on a GPU -> which of their outputs is as wide as a group's neurons;
None: their first input is."""


def operation(op: Op) -> Operation:
    """One of the equal operators that `op` stands for.

    Raises:
        ValueError: a product of a type that no device has a peak for.
    """
    moved = float(op.bytes_read + op.bytes_written)
    if not op.flops:
        return Operation(_moving_kind(op.name), "bf16", 0.0, moved)
    dtype = DTYPES.get(op.dtype)
    if dtype is None:
        raise ValueError(f"{op.name} multiplies in {op.dtype}: no device has a peak for it")
    flops = float(op.flops)
    if op.name.startswith("fused.attention"):
        kind = "attention_backward" if op.name.endswith("_backward") else "attention"
        queries, keys, size, heads = _attention(op)
        return Operation(kind, dtype, flops, moved, queries, keys, size, heads=heads)
    if op.name.startswith("mone.") or op.name.startswith("fused.grouped_gemm"):
        kind = "grouped_wgrad" if op.name in WEIGHT_GRADIENTS else "grouped_gemm"
        rows, columns, depth, kept = _grouped(op)
        return Operation(kind, dtype, flops, moved, rows, columns, depth, kept)
    rows, columns = _matrix(op)
    depth = max(1, round(flops / (2.0 * rows * columns)))
    return Operation("gemm", dtype, flops, moved, rows, columns, depth)


def _moving_kind(name: str) -> str:
    if name in SELECTIONS:
        return "selection"
    return "permutation" if name.startswith(PERMUTATIONS) else "memory"


def _matrix(op: Op) -> tuple[float, int]:
    """[rows, columns] of a product's result; matrices of a batch share the device, row by row."""
    shape = op.outputs[0]
    return float(max(1, math.prod(shape[:-1]))), max(1, shape[-1] if shape else 1)


def _attention(op: Op) -> tuple[float, int, int, int]:
    """(queries, keys, head size, heads) of inputs q [s, b, n, d], k [t, b, m, d], ...."""
    queries, keys = op.inputs[0], op.inputs[1]
    return float(queries[0]), keys[0], queries[-1], math.prod(queries[1:-1])


def _grouped(op: Op) -> tuple[float, int, int, float]:
    """(rows of one group, columns, depth, kept share) of products with weights [E, ., .].

    A weight gradient's result is the one with three dimensions, and what it sums over are the rows.
    """
    if op.name in GPU_PRODUCTS:
        return _gpu_product(op)
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


def _gpu_product(op: Op) -> tuple[float, int, int, float]:
    """As `_grouped`, of the kernels of MoNE's experts: a group is an expert, or one of its blocks
    of neurons, whose rows (of [P, B]) are then those that keep the block."""
    at = GPU_PRODUCTS[op.name]
    rows, width = op.inputs[0] if at is None else op.outputs[at]
    stacked = [shape for shape in (*op.inputs, *op.outputs) if len(shape) == 3]
    experts, neurons, hidden = stacked[0]
    width = min(width, neurons)  # of few rows, whole tiles of neurons
    each = max(1.0, rows / (experts * neurons // width))
    if op.name == "mone.weight_grad":
        return float(width), hidden, max(1, round(each)), 1.0
    if op.name in ("mone.hidden_product", "mone.decode_down"):
        terms = sum(len(shape) == 3 for shape in op.inputs)
        return each, hidden, width * terms, 1.0
    return each, width, hidden, 1.0
