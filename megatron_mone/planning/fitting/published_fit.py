"""Fits what the planner cannot know of a cluster to published runs, by few numbers.

Of each cluster: one factor on all compute peaks, one on the memory bandwidth, the host's seconds a
launch, and what overlap costs. Only runs marked `calibrates` are looked at. May touch: nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.fitting.published import PublishedRun, compare
from megatron_mone.planning.planner import Planned

COMPUTE = ("gemm", "grouped_gemm", "attention")
# Bounds of each number, and steps of the last grid on either side of the best.
BOUNDS = {
    "compute": (0.4, 1.0),
    "memory": (0.6, 1.0),
    "host_seconds": (0.0, 3e-4),
    "overlap_tax": (0.0, 0.6),
}
# Of a plain operator, which no published total tells from the others: an assumption.
OPERATOR_SECONDS = 1e-5
_STEPS = 7
_ROUNDS = 4


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


def with_values(values: Mapping[str, float], source: str) -> Efficiency:
    """The assumed efficiency with the numbers of BOUNDS put in.

    Args:
        values: `compute` scales peak shares, `memory` bandwidth shares, the others replace.
        source: what they were fitted to.
    """
    start = Efficiency()
    curves = {
        kind: replace(
            curve,
            peak_share=curve.peak_share * (values["compute"] if kind in COMPUTE else 1.0),
            bandwidth_share=curve.bandwidth_share * values["memory"],
        )
        for kind, curve in start.curves.items()
    }
    return replace(
        start, curves=curves, host_seconds=values["host_seconds"],
        operator_seconds=OPERATOR_SECONDS,
        overlap_tax=values["overlap_tax"], source=source,
    )  # fmt: skip


def fit_published(
    rows: Sequence[tuple[PublishedRun, Planned]], free: Sequence[str]
) -> PublishedFit:
    """The numbers that bring predicted times of some runs nearest to the published ones.

    One number after the other is searched on a grid that narrows, four rounds: errors are of sums
    and maxima, with corners that slopes do not see.

    Args:
        rows: runs of one cluster, planned with any efficiency.
        free: of BOUNDS; the others stay as assumed.

    Raises:
        ValueError: fewer runs than numbers.
    """
    if len(rows) < len(free):
        raise ValueError(f"{len(rows)} published runs cannot fit {len(free)} numbers: {list(free)}")
    names = ", ".join(run.name for run, _ in rows)
    source = f"fitted to {len(rows)} published runs: {names}"
    values = {
        "compute": 1.0, "memory": 1.0, "host_seconds": Efficiency().host_seconds,
        "overlap_tax": Efficiency().overlap_tax,
    }  # fmt: skip
    widths = {name: (BOUNDS[name][1] - BOUNDS[name][0]) / 2 for name in free}

    def loss(trial: Mapping[str, float]) -> float:
        errors = times_off(rows, with_values(trial, source)).values()
        return float(sum(np.log1p(error) ** 2 for error in errors))

    for _ in range(_ROUNDS):
        for name in free:
            low, high = BOUNDS[name]
            around = values[name] + np.linspace(-widths[name], widths[name], _STEPS)
            tries = {float(np.clip(x, low, high)) for x in (*around, values[name])}
            losses = {tried: loss({**values, name: tried}) for tried in sorted(tries)}
            values[name] = min(losses, key=lambda tried: losses[tried])
            widths[name] /= 2
    fitted = with_values(values, source)
    return PublishedFit(fitted, values, times_off(rows, fitted))


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
