"""Means over a few seeds, and differences of two cells seed by seed, with 95% intervals.

Seeds are few, so intervals are Student's t; a difference is paired, because runs of one seed start
from the same draws and read the same data in the same order. Pure.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The 0.975 quantile by degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.960
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval.

    Attributes:
        mean: of the values.
        half_width: of the interval; None of one value, which says nothing of its spread.
        count: values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float:
        """Lower end; minus infinity of one value."""
        return self.mean - (math.inf if self.half_width is None else self.half_width)

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + (math.inf if self.half_width is None else self.half_width)

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.low <= 0 <= self.high


def estimate(values: Sequence[float]) -> Estimate:
    """Of independent values, at least one."""
    count = len(values)
    if count < 2:
        return Estimate(values[0], None, count)
    t = _T[count - 2] if count - 2 < len(_T) else _NORMAL
    return Estimate(
        statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(count), count
    )


def difference(of: Mapping[int, float], against: Mapping[int, float]) -> Estimate:
    """Of two cells' values by seed: `of` less `against`, over the seeds that both have.

    Raises:
        ValueError: they share no seed.
    """
    shared = sorted(of.keys() & against.keys())
    if not shared:
        raise ValueError("the two cells share no seed")
    return estimate([of[seed] - against[seed] for seed in shared])


def best_shares(losses: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Name -> share of 2,000 resamples of the seeds, with replacement, in which it has the lowest
    mean (Efron's bootstrap). The same draws in every call.

    Args:
        losses: name -> seed -> value.

    Raises:
        ValueError: the names share no seed.
    """
    seeds = sorted(set.intersection(*({*one} for one in losses.values())))
    if not seeds:
        raise ValueError("the cells share no seed")
    draw = random.Random(0)
    won = dict.fromkeys(losses, 0)
    for _ in range(_RESAMPLES):
        drawn = draw.choices(seeds, k=len(seeds))
        won[min(losses, key=lambda name: sum(losses[name][seed] for seed in drawn))] += 1
    return {name: count / _RESAMPLES for name, count in won.items()}
