"""The least time a machine allows: operations over its peak or bytes over its bandwidth.

Counts are of the algorithm, as in the table "What it costs": multiply-adds of the products (two
operations each), and every tensor moved once in each phase. Peaks are measured in the same run.
Shapes: N rows, H hidden, F neurons, E experts, r the share kept (1: dense).
"""

import torch

from megatron_mone.benchmarking.cases import Cell
from megatron_mone.benchmarking.timing import Call, seconds_of
from megatron_mone.kernels.race_results import DTYPES, Peaks

PHASES = ("forward", "forward_backward")
_SIDES = (256, 512, 1024, 2048, 4096)
_LONG_ENOUGH = 0.03  # seconds of a product; a larger one is tried while it takes less
_COPY = 1 << 26  # elements


def measure_peaks(device: torch.device, *, elements: int = _COPY) -> Peaks:
    """Best of a few products of growing size, and of a few copies; a second or two."""
    flops = dict.fromkeys(DTYPES, 0.0)
    for name, dtype in DTYPES.items():
        for side in _SIDES:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            # as in a forward: some bf16 libraries are slow on any other layout
            seconds = _best(lambda a=a, b=b: a @ b.t())
            flops[name] = max(flops[name], 2 * side**3 / seconds)
            if seconds > _LONG_ENOUGH:
                break
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source))
    return Peaks(flops=flops, bandwidth=2 * source.nbytes / seconds)


def best_of(first: Peaks, second: Peaks) -> Peaks:
    """The higher of two measurements: another process can only lower them."""
    flops = {name: max(rate, second.flops[name]) for name, rate in first.flops.items()}
    return Peaks(flops=flops, bandwidth=max(first.bandwidth, second.bandwidth))


def operations(cell: Cell, ratio: float | None, phase: str) -> float:
    """Floating-point operations: dense 3 N H F multiply-adds forward and 9 with backward, MoNE
    (1 + 2 r) and (1 + 8 r)."""
    r = 1.0 if ratio is None else ratio
    share = 1 + 2 * r if phase == "forward" else 1 + 8 * r
    return 2.0 * cell.tokens * cell.hidden * cell.neurons * share


def bytes_moved(cell: Cell, ratio: float | None, phase: str) -> float:
    """Bytes that no implementation avoids.

    Forward: the parameters that rows touch, x and y. With backward: those parameters again, all
    gradients written, x, dy and dx, and what is kept for the backward written and read.
    """
    r = 1.0 if ratio is None else ratio
    size = DTYPES[cell.dtype].itemsize
    neuron = cell.hidden * size
    touched = 0.0
    for count in cell.counts:
        # a neuron is missed by all rows of its expert with (1 - r)^count, if choices are spread
        kept = 0.0 if count == 0 else 1.0 - (1.0 - r) ** count
        touched += (neuron if count else 0) * cell.neurons * (1 + 2 * kept)
    rows = cell.tokens * neuron
    if phase == "forward":
        return touched + 2 * rows
    gradients = 3 * cell.experts * cell.neurons * neuron
    index = 0 if ratio is None else 2
    kept_rows = cell.tokens * r * cell.neurons * (2 * size + index)
    return 2 * touched + gradients + 5 * rows + 2 * kept_rows


def limit_ms(cell: Cell, ratio: float | None, phase: str, peaks: Peaks) -> float:
    """Milliseconds below which this machine cannot go.

    bf16 products may also run in fp32, which is the faster of the two without bf16 units.
    """
    rate = max(peaks.flops[cell.dtype], peaks.flops["fp32"])
    compute = operations(cell, ratio, phase) / rate
    return 1e3 * max(compute, bytes_moved(cell, ratio, phase) / peaks.bandwidth)


def _best(call: Call, repeats: int = 5, spend: float = 0.3) -> float:
    """Least seconds of a call, the first left out; short ones are tried for `spend` seconds."""
    seconds: list[float] = []
    while len(seconds) <= repeats or (sum(seconds) < spend and len(seconds) < 1000):
        seconds.append(seconds_of(call))
    return min(seconds[1:])
