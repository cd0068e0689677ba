"""Efficiency curves fitted to published times of single kernels: tests/published/kernels/*.json.

A file names its cluster's device and source; a point is one kernel: its kind of roofline.DEFAULTS,
shape, operations, bytes and microseconds. May touch: the files it is given.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mone.common.checked_json import Field, load
from megatron_mone.common.device import Device
from megatron_mone.planning.cost.roofline import DEFAULTS, WIDE_HEAD, Curve, Operation
from megatron_mone.planning.fitting.curve_fit import (
    PRIOR,
    free_parameters,
    least_squares,
    with_parameters,
)

COLUMNS = ("kind", "rows", "columns", "depth", "heads", "flops", "bytes", "us")
_FIX = "docs/PUBLISHED_RUNS.md describes the file"
_HALF_GRID, _WIDE_LOSS = 1e5, 0.5  # an attention fit's start


@dataclass(frozen=True)
class KernelPoint:
    """One published time.

    Attributes:
        operation: the kernel.
        seconds: that it took.
    """

    operation: Operation
    seconds: float


@dataclass(frozen=True)
class KernelBenchmark:
    """One file.

    Attributes:
        name: of the file.
        cluster: whose device it was measured on.
        source: where it is published.
        points: at least one.
    """

    name: str
    cluster: str
    source: str
    points: tuple[KernelPoint, ...]


def read_benchmark(path: Path) -> KernelBenchmark:
    """Read a file.

    Raises:
        ValueError: one line that names the file, the place and what is wrong there.
    """
    document = Field(load(path, _FIX), path, _FIX)
    dtype = document["dtype"].text()
    columns = [one.text() for one in document["columns"].elements()]
    if tuple(columns) != COLUMNS:
        document["columns"].fail(f"{columns} must be {list(COLUMNS)}")
    points = []
    for row in document["points"].elements():
        kind, *numbers = list(row.elements())
        rows, wide, depth, heads, flops, moved, micro = (one.number() for one in numbers)
        one = Operation(
            kind.text(), dtype, flops, moved, rows, int(wide), int(depth), heads=int(heads)
        )
        points.append(KernelPoint(one, 1e-6 * micro))
    return KernelBenchmark(
        path.stem, document["cluster"].text(), document["source"].text(), tuple(points)
    )


def fit_benchmarks(benchmarks: Iterable[KernelBenchmark], device: Device) -> dict[str, Curve]:
    """Kind -> the curve nearest to the points of that kind, by least squares of logarithms.

    Args:
        benchmarks: all of this device.
        device: that they were measured on.
    """
    found: dict[str, list[KernelPoint]] = {}
    for benchmark in benchmarks:
        for point in benchmark.points:
            found.setdefault(point.operation.kind, []).append(point)
    return {kind: _fit(kind, points, device) for kind, points in sorted(found.items())}


def spread(curve: Curve, points: Iterable[KernelPoint], device: Device) -> float:
    """Root of the mean square of log(predicted / published)."""
    off = [np.log(curve.seconds(p.operation, device) / p.seconds) for p in points]
    return float(np.sqrt(np.mean(np.square(off))))


def _fit(kind: str, points: list[KernelPoint], device: Device) -> Curve:
    start = DEFAULTS[kind]
    if kind.startswith("attention"):
        wide = any(point.operation.depth > WIDE_HEAD for point in points)
        start = replace(start, half_grid=_HALF_GRID, wide_loss=_WIDE_LOSS if wide else 0.0)
    origin = free_parameters(start)

    def residuals(free: NDArray[np.float64]) -> NDArray[np.float64]:
        curve = with_parameters(start, free)
        off = [np.log(curve.seconds(p.operation, device) / p.seconds) for p in points]
        return np.concatenate([off, np.sqrt(PRIOR) * (free - origin)])

    return with_parameters(start, least_squares(residuals, origin))
