"""Fits an efficiency curve to measured times, and says how well it fits; the method of all fits.

Least squares on the logarithm of the seconds, so that a kernel of 10 us counts as much as one of
10 ms, by Levenberg-Marquardt steps in numpy. What the measurements do not tell stays near the
curve the fit starts from. Touches nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mone.common.device import Device
from megatron_mone.planning.cost.roofline import Curve, Operation

SHARES = ("peak_share", "bandwidth_share")
SCALES = ("half_rows", "half_depth", "half_bytes", "launch", "sparse_loss")
PRIOR = 1e-3
"""Weight, against one measurement's, of one parameter staying a factor e from its start."""
_STEPS = 200


@dataclass(frozen=True)
class Measurement:
    """One operation and the seconds it took; above 0."""

    operation: Operation
    seconds: float


@dataclass(frozen=True)
class CurveFit:
    """A fitted curve.

    Attributes:
        curve: the parameters.
        measurements: how many it was fitted to.
        median_error, worst_error: of abs(predicted / measured - 1) over those same measurements;
            what it is worth for others, only others tell.
    """

    curve: Curve
    measurements: int
    median_error: float
    worst_error: float


def fit(measurements: Sequence[Measurement], device: Device, start: Curve) -> CurveFit:
    """The curve nearest to measurements of one class of operations.

    Args:
        measurements: at least 2, of one kind.
        device: they were taken on.
        start: its `column_tile` is kept, and so are parameters that are 0; shares of exactly 1
            start at 0.99, so that they can move.

    Raises:
        ValueError: too few measurements, of several kinds, or a time that is not above 0.
    """
    _check(measurements)
    origin = free_parameters(start)
    measured = np.log([one.seconds for one in measurements])

    def residuals(free: NDArray[np.float64]) -> NDArray[np.float64]:
        now = with_parameters(start, free)
        predicted = np.log([now.seconds(one.operation, device) for one in measurements])
        return np.concatenate([predicted - measured, np.sqrt(PRIOR) * (free - origin)])

    fitted = with_parameters(start, least_squares(residuals, origin))
    errors = np.abs(error_ratios(fitted, measurements, device))
    return CurveFit(fitted, len(measurements), float(np.median(errors)), float(errors.max()))


def error_ratios(
    curve: Curve, measurements: Sequence[Measurement], device: Device
) -> NDArray[np.float64]:
    """predicted / measured - 1 of each measurement; use those the curve was not fitted to."""
    return np.array(
        [curve.seconds(one.operation, device) / one.seconds - 1 for one in measurements]
    )


def _check(measurements: Sequence[Measurement]) -> None:
    kinds = sorted({one.operation.kind for one in measurements})
    if len(measurements) < 2 or len(kinds) != 1:
        raise ValueError(
            f"{len(measurements)} measurements of {', '.join(kinds) or 'nothing'}: a curve is "
            f"fitted to 2 or more of one kind of operation"
        )
    for one in measurements:
        idle = not one.operation.flops and not one.operation.bytes
        if idle or not 0 < one.seconds < np.inf:
            raise ValueError(
                f"a measured {kinds[0]} of {one.operation.flops:g} operations took seconds = "
                f"{one.seconds}: leave out what does nothing or has no time"
            )


def free_parameters(start: Curve) -> NDArray[np.float64]:
    """The parameters of a curve that a fit may move, those above 0, as any real numbers."""
    return np.array([_free(name, getattr(start, name)) for name in _moving(start)])


def with_parameters(start: Curve, free: NDArray[np.float64]) -> Curve:
    """The curve with the parameters of `free_parameters`, the others as they are in `start`."""
    changes: dict[str, Any] = {
        name: _bound(name, value) for name, value in zip(_moving(start), free, strict=True)
    }
    return replace(start, **changes)


def _moving(start: Curve) -> list[str]:
    return [name for name in SHARES + SCALES if getattr(start, name) > 0]


def _free(name: str, value: float) -> float:
    """A parameter as one that may take any real value."""
    if name in SHARES:
        share = min(value, 0.99)
        return float(np.log(share / (1 - share)))
    return float(np.log(value))


def _bound(name: str, free: float) -> float:
    """Undoes `_free`, within what floats hold."""
    if name in SHARES:
        return float(max(1 / (1 + np.exp(-free)), 1e-9))
    return float(np.exp(free))


def least_squares(
    residuals: Callable[[NDArray[np.float64]], NDArray[np.float64]], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Levenberg-Marquardt with a numeric Jacobian, steps of at most a factor e^2.

    Args:
        residuals: [parameters] -> [residuals], at least as many; with a prior on each parameter,
            so that none is without effect.
        start: [parameters].

    Returns:
        [parameters] of a local minimum of the sum of squares.
    """
    here, damping = start.copy(), 1e-2
    now = residuals(here)
    for _ in range(_STEPS):
        slope = np.stack(
            [
                (residuals(here + 1e-5 * axis) - residuals(here - 1e-5 * axis)) / 2e-5
                for axis in np.eye(len(here))
            ],
            axis=1,
        )
        normal = slope.T @ slope
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope.T @ now)
        there = np.clip(here + np.clip(step, -2, 2), -60, 60)
        then = residuals(there)
        if then @ then < now @ now:
            gain = 1 - (then @ then) / (now @ now)
            here, now, damping = there, then, damping / 3
            if gain < 1e-10:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return here
