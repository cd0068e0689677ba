"""Laws of loss, L(x) = E + A x^-a, fitted to a ladder of sizes, with bands of what a few seeds and
sizes leave open.

The form is that of Hoffmann et al., "Training Compute-Optimal Large Language Models" (2022), in one
variable. Shapes: R laws at a time, n sizes, G exponents that are tried. Pure.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST = 4
"""Different sizes below which three numbers are not fitted."""
DRAWS = 1000
_EXPONENTS = (0.005, 2.0)
_GRID, _PASSES = 40, 3
Values = NDArray[np.float64]

Points = Sequence[tuple[float, Mapping[int, float]]]
"""Of each size: x, and seed -> nats a token."""
Draw = Sequence[tuple[int, Sequence[int]]]
"""A resample: which sizes, and which seeds of each."""


@dataclass(frozen=True)
class Law:
    """E + A x^-a.

    Attributes:
        floor: E >= 0, nats a token that no x goes below.
        factor: A >= 0.
        exponent: a, within 0.005 to 2.
    """

    floor: float
    factor: float
    exponent: float

    def at(self, x: float) -> float:
        """Nats a token at x."""
        return float(self.floor + self.factor * x**-self.exponent)

    def reaches(self, loss: float) -> float:
        """The x at which it is `loss`; infinity where it never is."""
        if loss <= self.floor or not self.factor:
            return math.inf
        return float(((loss - self.floor) / self.factor) ** (-1 / self.exponent))


@dataclass(frozen=True)
class Band:
    """A value and the middle 95% of what resamples gave for it."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether it leaves out 0."""
        return not self.low <= 0 <= self.high

    def text(self, form: str) -> str:
        """As text."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def fit(x: Sequence[float], losses: Sequence[float]) -> Law:
    """The law of least squares.

    Args:
        x: parameters or operations, of at least LEAST different sizes.
        losses: nats a token, one an x.

    Raises:
        ValueError: there are fewer sizes.
    """
    (law,) = _fit_all(np.array([x], float), np.array([losses], float))
    return law


def _fit_all(x_Rn: Values, losses_Rn: Values) -> list[Law]:
    """A law a row: E and A follow of an exponent in closed form, the exponent is of a grid of _GRID
    that is laid _PASSES times, each between the neighbours of the last's best."""
    fewest = min(len({*row}) for row in x_Rn.tolist())
    if fewest < LEAST:
        raise ValueError(f"{fewest} sizes are no ladder: a law of three numbers needs {LEAST}")
    middle_R = np.exp(np.log(x_Rn).mean(axis=1))
    scaled_Rn = x_Rn / middle_R[:, None]
    rows = np.arange(len(x_Rn))
    low_R, high_R = (np.full(len(rows), end) for end in _EXPONENTS)
    for _ in range(_PASSES):
        grid_RG = np.geomspace(low_R, high_R, _GRID, axis=1)
        floors_RG, factors_RG, errors_RG = _of_exponents(grid_RG, scaled_Rn, losses_Rn)
        best_R = errors_RG.argmin(axis=1)
        low_R = grid_RG[rows, np.maximum(best_R - 1, 0)]
        high_R = grid_RG[rows, np.minimum(best_R + 1, _GRID - 1)]
    exponents_R = grid_RG[rows, best_R]
    factors_R = factors_RG[rows, best_R] * middle_R**exponents_R
    found = zip(floors_RG[rows, best_R], factors_R, exponents_R, strict=True)
    return [Law(float(floor), float(factor), float(power)) for floor, factor, power in found]


def _of_exponents(
    grid_RG: Values, x_Rn: Values, losses_Rn: Values
) -> tuple[Values, Values, Values]:
    """(E, A, sum of squares) [R, G] of the best law of each exponent, E and A not below 0."""
    powers_RGn = x_Rn[:, None, :] ** -grid_RG[:, :, None]
    losses_R1n = losses_Rn[:, None, :]
    mean_R1, middle_RG = losses_R1n.mean(axis=2), powers_RGn.mean(axis=2)
    apart_RGn = powers_RGn - middle_RG[:, :, None]
    factors_RG = (apart_RGn * losses_R1n).sum(axis=2) / (apart_RGn**2).sum(axis=2)
    factors_RG = np.maximum(factors_RG, 0.0)
    floors_RG = mean_R1 - factors_RG * middle_RG
    without_RG = (powers_RGn * losses_R1n).sum(axis=2) / (powers_RGn**2).sum(axis=2)
    factors_RG = np.where(floors_RG < 0, without_RG, factors_RG)
    floors_RG = np.maximum(floors_RG, 0.0)
    fitted_RGn = floors_RG[:, :, None] + factors_RG[:, :, None] * powers_RGn
    return floors_RG, factors_RG, ((fitted_RGn - losses_R1n) ** 2).sum(axis=2)


def draws(sizes: int, seeds: Sequence[int]) -> list[Draw]:
    """DRAWS resamples of sizes and of the seeds of each, with replacement, each of LEAST different
    sizes or more; the same in every call, so that two ladders are drawn alike."""
    draw = random.Random(0)
    found: list[Draw] = []
    while len(found) < DRAWS:
        chosen = draw.choices(range(sizes), k=sizes)
        if len({*chosen}) >= LEAST:
            found.append([(size, draw.choices(seeds, k=len(seeds))) for size in chosen])
    return found


def fitted(points: Points) -> Law:
    """The law of the means over seeds."""
    return fit([x for x, _ in points], [_mean(losses, [*losses]) for _, losses in points])


def fitted_again(points: Points, resamples: Sequence[Draw]) -> list[Law]:
    """The law of each resample.

    The mean of n seeds drawn with replacement spreads (n - 1) / n as much as that of n new ones;
    its deviation is stretched to make up for that.
    """
    all_x, all_losses = [], []
    for resample in resamples:
        x, losses = [], []
        for size, seeds in resample:
            at, by_seed = points[size]
            mean, count = _mean(by_seed, [*by_seed]), len(by_seed)
            stretch = math.sqrt(count / (count - 1)) if count > 1 else 1.0
            x.append(at)
            losses.append(mean + stretch * (_mean(by_seed, seeds) - mean))
        all_x.append(x)
        all_losses.append(losses)
    return _fit_all(np.array(all_x), np.array(all_losses))


def band(value: float, again: Sequence[float]) -> Band:
    """A value, and the middle 95% of what resamples gave; infinite ones count."""
    ordered = sorted(again)
    last = len(ordered) - 1
    return Band(value, ordered[math.floor(0.025 * last)], ordered[math.ceil(0.975 * last)])


def _mean(losses: Mapping[int, float], seeds: Sequence[int]) -> float:
    return sum(losses[seed] for seed in seeds) / len(seeds)
