"""The method of fits: an efficiency curve's parameters as real numbers, and least squares of them.

Levenberg-Marquardt steps in numpy. What the measurements do not tell stays near the
curve the fit starts from. Touches nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mone.planning.cost.roofline import SCALES, SHARES, Curve

PRIOR = 1e-3
"""Weight, against one measurement's, of one parameter staying a factor e from its start."""
_STEPS = 200


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
