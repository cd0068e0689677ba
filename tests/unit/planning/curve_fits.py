"""One curve fitted to measured operations, by the method of fitting/curve_fit.py.

Least squares on the logarithm of the seconds, so that a kernel of 10 us counts as much as one of
10 ms. What the measurements do not tell stays near the curve the fit starts from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mone.common.device import Device
from megatron_mone.planning.cost.roofline import Curve, Operation
from megatron_mone.planning.fitting.curve_fit import (
    PRIOR,
    free_parameters,
    least_squares,
    with_parameters,
)


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
