"""Fits what the planner cannot know of a cluster to published runs, by few numbers.

Kernels come first: their curves are fitted to published times of single kernels, where there are
any (kernel_benchmarks.py). What a step shows beside them is told by the totals of runs: one factor
on all compute peaks, what the host costs, and what overlap costs. Only runs marked `calibrates` are
looked at. May touch: nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mone.planning.cost.bands import FittedRun, place_of
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.roofline import DEFAULTS, Curve
from megatron_mone.planning.fitting.published import PublishedRun, compare
from megatron_mone.planning.planner import Planned

PRODUCTS = ("gemm", "grouped_gemm", "grouped_wgrad", "attention", "attention_backward")
"""What `compute` scales: every kernel of tensor cores, for a training run holds lower clocks than
the benchmark of one kernel does."""
BOUNDS = {
    "compute": (0.4, 1.6),
    "memory": (0.5, 1.4),
    "function_seconds": (2e-5, 6e-4),
    "wait_seconds": (1e-5, 1e-3),
    "overlap_tax": (0.02, 0.6),
}
"""Name -> between what it is looked for. `compute` scales the peak shares of PRODUCTS, `memory` the
bandwidth share of the rest, the others are fields of Efficiency."""
PRIOR = 2e-4
"""Weight, against one run's error, of one number staying a factor e from its start."""
TAIL = 0.05
"""Error from which a run counts linearly: one that has a cause of its own drags no other along."""
_STEP, _ROUNDS = 0.04, 8


@dataclass(frozen=True)
class PublishedFit:
    """A fit.

    Attributes:
        efficiency: that was found.
        values: name of BOUNDS -> its number.
        errors: run -> predicted / published - 1, of those it was fitted to.
    """

    efficiency: Efficiency
    values: dict[str, float]
    errors: dict[str, float]


def start_values() -> dict[str, float]:
    """The numbers of BOUNDS as they are assumed."""
    assumed = Efficiency()
    scales = {"compute": 1.0, "memory": 1.0}
    return {name: scales.get(name, getattr(assumed, name, 0.0)) for name in BOUNDS}


def with_values(
    values: Mapping[str, float], source: str, curves: Mapping[str, Curve] | None = None
) -> Efficiency:
    """An efficiency with the numbers of BOUNDS put in.

    Args:
        values: see BOUNDS.
        source: what they were fitted to.
        curves: kind -> curve that the numbers scale; the assumed ones where None or left out.
    """

    def scaled(kind: str, curve: Curve) -> Curve:
        if kind in PRODUCTS:
            return replace(curve, peak_share=min(1.0, curve.peak_share * values["compute"]))
        return replace(curve, bandwidth_share=min(1.0, curve.bandwidth_share * values["memory"]))

    start = {**DEFAULTS, **(curves or {})}
    own: dict[str, Any] = {k: v for k, v in values.items() if k not in ("compute", "memory")}
    scaled_curves = {kind: scaled(kind, curve) for kind, curve in start.items()}
    return replace(Efficiency(), curves=scaled_curves, source=source, **own)


def fit_published(
    rows: Sequence[tuple[PublishedRun, Planned]],
    free: Sequence[str],
    curves: Mapping[str, Curve] | None = None,
) -> PublishedFit:
    """The numbers that bring predicted times of some runs nearest to the published ones.

    Least squares of the errors' logarithms, those beyond TAIL taken linearly, by damped steps on
    the numbers' logarithms; slopes are taken over 4%, so that corners of sums and maxima are seen.

    Args:
        rows: runs of one cluster, planned with any efficiency.
        free: of BOUNDS; the others stay as assumed.
        curves: of kernels that were fitted before; see `with_values`.

    Raises:
        ValueError: fewer runs than numbers.
    """
    if len(rows) < len(free):
        raise ValueError(f"{len(rows)} published runs cannot fit {len(free)} numbers: {list(free)}")
    names = ", ".join(run.name for run, _ in rows)
    kernels = f" and to published times of {', '.join(sorted(curves))}" if curves else ""
    source = f"fitted to {len(rows)} published runs: {names}{kernels}"
    start = start_values()
    origin = np.log([start[name] for name in free])
    low, high = (np.log([BOUNDS[name][side] for name in free]) for side in (0, 1))

    def values(at: NDArray[np.float64]) -> dict[str, float]:
        return {**start, **dict(zip(free, map(float, np.exp(at)), strict=True))}

    def residuals(at: NDArray[np.float64]) -> NDArray[np.float64]:
        found = times_off(rows, with_values(values(at), source, curves)).values()
        off = np.log1p(list(found)) / TAIL
        soft = np.sign(off) * np.sqrt(2 * (np.sqrt(1 + off**2) - 1)) * TAIL
        return np.concatenate([soft, np.sqrt(PRIOR) * (at - origin)])

    # A host that no pass waits for has no slope: the search starts from a slow one, too.
    slow = origin + np.log(2.0) * np.array([name.endswith("_seconds") for name in free])
    found = [_nearest(residuals, one, low, high) for one in (origin, slow)]
    at = min(found, key=lambda one: float(np.sum(residuals(one) ** 2)))
    fitted = with_values(values(at), source, curves)
    errors = times_off(rows, fitted)
    runs = tuple(
        FittedRun(run.name, place_of(planned.traced.facts), abs(float(np.log1p(errors[run.name]))))
        for run, planned in rows
    )
    fitted = replace(fitted, runs=runs, numbers=len(free))
    return PublishedFit(fitted, values(at), errors)


def _nearest(
    residuals: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    start: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> NDArray[np.float64]:
    """A minimum of the sum of squares between two bounds, by Levenberg-Marquardt steps."""
    at, damping = np.clip(start, low, high), 1e-3
    now = residuals(at)
    for _ in range(_ROUNDS):
        slope = np.stack(
            [(residuals(at + _STEP * axis) - now) / _STEP for axis in np.eye(len(at))], axis=1
        )
        normal = slope.T @ slope
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope.T @ now)
            there = np.clip(at + np.clip(step, -0.7, 0.7), low, high)
            then = residuals(there)
            if then @ then < now @ now:
                break
            damping = max(damping, 1e-2) * 6
        else:
            return at
        done = (now @ now - then @ then) < 1e-4 * (now @ now)
        at, now, damping = there, then, damping / 4
        if done:
            return at
    return at


def times_off(
    rows: Sequence[tuple[PublishedRun, Planned]], efficiency: Efficiency
) -> dict[str, float]:
    """run -> predicted / published - 1 of its time."""
    found = {}
    for run, planned in rows:
        anew = replanned(planned, efficiency)
        found[run.name] = next(compare(run, anew)).error
    return found


def replanned(planned: Planned, efficiency: Efficiency) -> Planned:
    """The same traces, predicted with another efficiency."""
    traced, cluster = planned.traced, planned.prediction.cluster
    return replace(planned, prediction=predict(traced.traces, traced.facts, cluster, efficiency))
