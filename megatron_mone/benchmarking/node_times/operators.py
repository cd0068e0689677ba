"""An operator of a trace as a call on this device: itself where torch or our kernels have it, else
what stands for its kind.

Fused kernels of a GPU job (Transformer Engine's, DeepEP's, ours in Triton) are timed as plain
torch makes the same product, attention or choice, at their shapes, and as a copy of their bytes
where they multiply nothing. Not run on a GPU.
Shapes: N rows, E experts, F neurons of an expert, H hidden, K kept entries.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_mone.benchmarking.node_times.arguments import call_of, value_type
from megatron_mone.benchmarking.node_times.clock import seconds
from megatron_mone.kernels import mone_grouped_mlp
from megatron_mone.kernels.cpu.shares import GateSums
from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype
from megatron_mone.planning.cost.roofline import Operation, operation
from megatron_mone.planning.fitting.node_times import (
    ATTENTION,
    CHOICE,
    COPY,
    EXPERTS,
    GROUPED,
    ITSELF,
    PRODUCT,
)
from megatron_mone.planning.tracing.stand_ins.gate_sums import ROW_SUMS, SHARE_SUMS, SLOPES
from megatron_mone.planning.tracing.trace import Op

Call = Callable[[], object]
_ON_CPU = ("mone.gate", "mone.up_down", "mone.up_down_backward")
_SUMS = (ROW_SUMS, SHARE_SUMS, SLOPES)
_CACHED = 16 << 20
"""Bytes of all copies of an operator's memory: more than a core's own caches."""
_MOST_COPIES = 4


class Operators:
    """Times operators on this rank.

    Args:
        device: of this rank.
        block: neurons that are chosen together.
        spend: seconds of an operator, as of `clock.seconds`.
    """

    def __init__(self, device: torch.device, block: int, spend: float) -> None:
        self._device, self._block, self._spend = device, block, spend
        self._experts: dict[tuple[int, ...], tuple[float, float]] = {}

    def time(self, op: Op) -> tuple[float, str]:
        """(seconds, what ran).

        Raises:
            RuntimeError, ValueError: it cannot run here, as a product in fp8.
        """
        if op.name in _ON_CPU:
            return self._of_experts(op), EXPERTS
        if op.name in _SUMS:
            return self._seconds([_sums(op)]), EXPERTS
        copies = max(1, min(_MOST_COPIES, _CACHED // max(1, op.bytes_read + op.bytes_written)))
        first = call_of(op, self._device)
        if first is not None:
            more = [call_of(op, self._device) for _ in range(copies - 1)]
            return self._seconds([first, *(one for one in more if one)]), ITSELF
        make, by = self._stand_in(op)
        return self._seconds([make() for _ in range(copies)]), by

    def _seconds(self, calls: Sequence[Call]) -> float:
        return seconds(calls, self._device, self._spend)

    def _stand_in(self, op: Op) -> tuple[Callable[[], Call], str]:
        one = operation(op)
        if one.kind == "gemm":
            return lambda: self._product(op, one), PRODUCT
        if one.kind == "grouped_gemm":
            return lambda: self._grouped(op, one), GROUPED
        if one.kind.startswith("attention"):
            return lambda: self._attention(op), ATTENTION
        if one.kind == "selection" and op.inputs and len(op.inputs[0]) == 2:
            return lambda: self._choice(op), CHOICE
        return lambda: self._copy(op), COPY

    def _product(self, op: Op, one: Operation) -> Call:
        dtype = _dtype(op)
        a = torch.randn(round(one.rows), one.depth, device=self._device).to(dtype)
        b = torch.randn(one.depth, one.columns, device=self._device).to(dtype)
        return lambda: torch.mm(a, b)

    def _grouped(self, op: Op, one: Operation) -> Call:
        """Equal groups, as many as the operations say."""
        dtype = _dtype(op)
        each = 2.0 * one.rows * one.columns * one.depth
        groups, rows = max(1, round(op.flops / each)), max(1, round(one.rows))
        a = torch.randn(groups * rows, one.depth, device=self._device).to(dtype)
        b = torch.randn(groups, one.depth, one.columns, device=self._device).to(dtype)
        if self._device.type == "cuda" and dtype == torch.bfloat16:
            ends = torch.arange(1, groups + 1, dtype=torch.int32, device=self._device) * rows
            return lambda: torch._grouped_mm(a, b, offs=ends)
        a_GNK = a.view(groups, rows, one.depth)
        return lambda: torch.bmm(a_GNK, b)

    def _attention(self, op: Op) -> Call:
        """Of [s, b, n, d], causal; k and v may have fewer heads, each repeated."""
        dtype = _dtype(op)
        q, k, v = (
            torch.randn(shape, device=self._device).to(dtype).permute(1, 2, 0, 3)
            for shape in op.inputs[:3]
        )
        heads = q.shape[1] // k.shape[1]
        k, v = (one.repeat_interleave(heads, 1) for one in (k, v))
        if not op.name.endswith("_backward"):
            return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
        leaves = q, k, v = tuple(one.detach().requires_grad_() for one in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        gradient = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    def _choice(self, op: Op) -> Call:
        x_NF = torch.randn(op.inputs[0], device=self._device)
        kept = max(1, min(x_NF.shape[1], op.outputs[0][-1] if len(op.outputs[0]) == 2 else 1))
        return lambda: torch.topk(x_NF, kept)

    def _copy(self, op: Op) -> Call:
        half = max(1, (op.bytes_read + op.bytes_written) // 2)
        a, b = (torch.ones(half, dtype=torch.uint8, device=self._device) for _ in range(2))
        return lambda: b.copy_(a)

    def _of_experts(self, op: Op) -> float:
        """The part of one operator in both passes of a layer's experts, by operations of each."""
        rows, hidden, experts, neurons, kept = _sizes(op)
        shape = rows, hidden, experts, neurons, kept
        if shape not in self._experts:
            self._experts[shape] = self._both_passes(*shape)
        forward, backward = self._experts[shape]
        if op.name == "mone.up_down_backward":
            return backward
        gate = 2.0 * rows * neurons * hidden
        rest = 4.0 * kept * hidden
        return forward * (gate if op.name == "mone.gate" else rest) / (gate + rest)

    def _both_passes(
        self, rows: int, hidden: int, experts: int, neurons: int, kept: int
    ) -> tuple[float, float]:
        x_NH = torch.randn(rows, hidden, requires_grad=True)
        probs_N = torch.rand(rows, requires_grad=True)
        weights = [
            (torch.randn(experts, neurons, hidden) * hidden**-0.5).requires_grad_()
            for _ in range(3)
        ]
        counts = [rows // experts + (e < rows % experts) for e in range(experts)]
        each = max(self._block, kept // max(1, rows))
        dy_NH = torch.randn(rows, hidden)

        def forward() -> torch.Tensor:
            return mone_grouped_mlp(
                x_NH, probs_N, counts, *weights, neurons_per_token=each,
                neuron_block=self._block, backend="auto",
            )[0]  # fmt: skip

        def both() -> None:
            torch.autograd.grad(forward(), [x_NH, probs_N, *weights], dy_NH)

        alone = self._seconds([forward])
        return alone, max(0.1 * alone, self._seconds([both]) - alone)


def _sums(op: Op) -> Call:
    """A sum over gates by the CPU kernels, of rows that keep equally many neurons of all."""
    kept, rows = op.inputs[0][0], op.inputs[3][0]
    each = max(1, kept // max(1, rows))
    given = op.inputs[4:]
    blocks, neurons = next(
        (shape for shape in (*given, *op.outputs) if len(shape) == 2), (1, 4 * each)
    )
    indices_NK = torch.rand(rows, neurons).topk(each).indices.sort().values
    mask = NeuronMask.unchecked(
        indices_NK.flatten().to(index_dtype(neurons)), torch.arange(rows + 1) * each, neurons,
        kept=each,
    )  # fmt: skip
    sums = GateSums(mask, torch.rand(rows * each), torch.arange(rows) * blocks // max(1, rows))
    weight_BF, total_N = torch.rand(blocks, neurons), 1.0 + torch.rand(rows)
    if op.name == ROW_SUMS:
        return lambda: sums.row_sums(weight_BF if given else None)
    if op.name == SHARE_SUMS:
        return lambda: sums.share_sums(blocks, total_N if given else None)
    total = total_N if len(given) > 1 else None
    return lambda: sums.slopes(weight_BF, total, total)


def _sizes(op: Op) -> tuple[int, int, int, int, int]:
    """(N, H, E, F, K) of an operator of a layer's experts, as traced_backend.py takes it down."""
    experts, neurons, hidden = next(shape for shape in op.inputs if len(shape) == 3)
    rows = op.inputs[0][0]
    kept = {
        "mone.gate": lambda: op.outputs[0][0],
        "mone.up_down": lambda: op.outputs[1][0],
        "mone.up_down_backward": lambda: op.inputs[6][0],
    }[op.name]()
    return rows, hidden, experts, neurons, kept


def _dtype(op: Op) -> torch.dtype:
    """Of a product.

    Raises:
        ValueError: of 8 bits, for which torch has no product that takes these operands alone.
    """
    if "float8" in op.dtype:
        raise ValueError(f"{op.name} multiplies in {op.dtype}, which is not timed")
    return value_type(op)
