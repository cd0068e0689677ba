"""The steps of one run over many ranks: taken from records, brought onto common steps, averaged.

Touches numpy arrays only. Shapes: R ranks, S steps, P phases and Q passes in the order of
common/phases.py; all times in ms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mone.common.phases import COMMUNICATION, PASSES, PHASES
from megatron_mone.profiling.rank_record import Coordinates, RankRecord, RankRun

Array = NDArray[Any]
PHASE_NAMES = tuple(PHASES)
_COMMUNICATION = [PHASE_NAMES.index(phase) for phase in COMMUNICATION]
_TRAFFIC, _CALLS = ("calls", "bytes", "ms"), ("calls", "ms")
_CALL = ("operation", "group", "bytes", "phase")
CallKey = tuple[str, str, int, str]


@dataclass(frozen=True)
class RankSteps:
    """What one rank measured of one run, step by step.

    Attributes:
        coordinates: of the rank.
        steps, windows, step_ms, rows: [S].
        phase_ms_PQS: zero where a phase or a pass never ran.
        traffic: "op group" -> [3, S] calls, bytes sent, ms.
        calls: (operation, group, bytes of one, phase) -> [2, S] calls, ms.
    """

    rank: int
    host: str
    complete: bool
    coordinates: Coordinates
    steps: Array
    windows: Array
    step_ms: Array
    rows: Array
    phase_ms_PQS: Array
    traffic: dict[str, Array]
    calls: dict[CallKey, Array]


def take_steps(record: RankRecord, run: RankRun) -> RankSteps:
    """The steps of `run` in a rank record; keeps nothing else of either."""
    steps = np.asarray(run.steps, dtype=np.int64)
    phase_ms = np.zeros((len(PHASE_NAMES), len(PASSES), len(steps)))
    for phase, passes in run.phases.items():
        for name, times in passes.items():
            phase_ms[PHASE_NAMES.index(phase), PASSES.index(name)] = times
    return RankSteps(
        rank=record.rank,
        host=record.host,
        complete=record.complete,
        coordinates=record.coordinates,
        steps=steps,
        windows=np.asarray(run.windows, dtype=np.int64),
        step_ms=np.asarray(run.step_ms, dtype=np.float64),
        rows=np.asarray(run.rows, dtype=np.float64),
        phase_ms_PQS=phase_ms,
        traffic={
            name: np.array([traffic.calls, traffic.bytes, traffic.ms], dtype=np.float64)
            for name, traffic in run.communication.items()
        },
        calls={
            (one.operation, one.group, one.bytes, one.phase): np.array(
                [one.calls, one.ms], dtype=np.float64
            )
            for one in run.collectives
        },
    )


def common_steps(ranks: list[RankSteps]) -> Array:
    """[S] the steps that every complete rank has (every rank, if none is complete)."""
    measured = [one for one in ranks if len(one.steps)]
    whole = [one for one in measured if one.complete] or measured
    common = whole[0].steps if whole else np.zeros(0, dtype=np.int64)
    for one in whole[1:]:
        common = np.intersect1d(common, one.steps, assume_unique=True)
    return common


def middle_half(slowest_ms_S: Array) -> Array:
    """Indices of the middle half of the steps by time, at least one, as many below as above."""
    left_out = (len(slowest_ms_S) + 1) // 4
    order = np.argsort(slowest_ms_S, kind="stable")
    return order[left_out : len(order) - left_out]


@dataclass(frozen=True)
class Aligned:
    """The ranks of a run on their common steps; a rank that lacks a step has zeros there.

    Attributes:
        ranks: by number.
        steps, windows: [S].
        measured_RS: whether a rank has a step.
        rank_weight_RS: averages a rank over its steps of the middle half: a row adds up to 1, or
            to 0 where a rank has none of them.
        weight_RS: averages over ranks, then over the middle half; adds up to 1.
    """

    ranks: list[RankSteps]
    steps: Array
    windows: Array
    measured_RS: Array
    step_ms_RS: Array
    rows_RS: Array
    phase_ms_RPQS: Array
    rank_weight_RS: Array
    weight_RS: Array

    @property
    def ran_PQ(self) -> Array:
        """Which passes of which phases took any time."""
        return self.phase_ms_RPQS.any(axis=(0, 3))

    def over_ranks_S(self, values_RS: Array) -> Array:
        """Mean of each step over the ranks that have it; also of [R, ..., S], giving [..., S]."""
        return values_RS.sum(axis=0) / self.measured_RS.sum(axis=0)

    def mean(self, values_RS: Array) -> Array:
        """Mean over ranks and the middle half; also of [R, P, Q, S], giving [P, Q]."""
        return np.einsum("r...s,rs->...", values_RS, self.weight_RS)

    def by_rank(self, values_RS: Array) -> Array:
        """Mean of each rank over the middle half; also of [R, P, S], giving [R, P]."""
        return np.einsum("r...s,rs->r...", values_RS, self.rank_weight_RS)

    def traffic(self) -> dict[str, dict[str, float]]:
        """Calls, bytes and ms of a step by "op group", mean over ranks and the middle half."""
        totals = self._totals([one.traffic for one in self.ranks])
        return {
            name: dict(zip(_TRAFFIC, map(float, total), strict=True))
            for name, total in sorted(totals.items())
        }

    def collectives(self) -> list[dict[str, Any]]:
        """Calls and ms of a step by operation, group, size and phase, likewise."""
        totals = self._totals([one.calls for one in self.ranks])
        return [
            dict(zip(_CALL, key, strict=True)) | dict(zip(_CALLS, map(float, total), strict=True))
            for key, total in sorted(totals.items())
        ]

    def _totals(self, ranks: Sequence[Mapping[Any, Array]]) -> dict[Any, Array]:
        totals: dict[Any, Array] = {}
        for found, weight_S in zip(ranks, self.weight_RS, strict=True):
            for key, values in found.items():
                totals[key] = totals.get(key, 0.0) + values @ weight_S
        return totals


def align(ranks: list[RankSteps], steps: Array) -> Aligned:
    """Bring ranks onto `steps`.

    Args:
        ranks: in the order of their numbers.
        steps: [S] from `common_steps`, not empty.
    """
    placed = [_on(one, steps) for one in ranks]
    aligned = [one for _, one in placed]
    measured_RS = np.stack([has_S for has_S, _ in placed])
    step_ms_RS = np.stack([one.step_ms for one in aligned])
    averaged_RS = np.zeros_like(step_ms_RS)
    middle = middle_half(step_ms_RS.max(axis=0))
    averaged_RS[:, middle] = measured_RS[:, middle]
    has_all = int(measured_RS.sum(axis=1).argmax())
    return Aligned(
        ranks=aligned,
        steps=steps,
        windows=aligned[has_all].windows,
        measured_RS=measured_RS,
        step_ms_RS=step_ms_RS,
        rows_RS=np.stack([one.rows for one in aligned]),
        phase_ms_RPQS=np.stack([one.phase_ms_PQS for one in aligned]),
        rank_weight_RS=averaged_RS / np.maximum(averaged_RS.sum(axis=1, keepdims=True), 1),
        weight_RS=averaged_RS / measured_RS.sum(axis=0) / len(middle),
    )


def _on(one: RankSteps, steps: Array) -> tuple[Array, RankSteps]:
    """Which of `steps` a rank has, and its values there, zero for the others."""
    places = np.searchsorted(one.steps, steps)
    has = np.isin(steps, one.steps)
    if len(has) == len(one.steps) and has.all():
        return has, one

    def spread(values: Array) -> Array:
        result = np.zeros((*values.shape[:-1], len(steps)), dtype=values.dtype)
        result[..., has] = values[..., places[has]]
        return result

    return has, replace(
        one,
        steps=steps,
        windows=spread(one.windows),
        step_ms=spread(one.step_ms),
        rows=spread(one.rows),
        phase_ms_PQS=spread(one.phase_ms_PQS),
        traffic={name: spread(values) for name, values in one.traffic.items()},
        calls={key: spread(values) for key, values in one.calls.items()},
    )


def compute_ms(step_ms_R: Array, phase_ms_RP: Array) -> Array:
    """[R] a step without the phases in which a rank mostly waits for others."""
    return step_ms_R - phase_ms_RP[:, _COMMUNICATION].sum(axis=1)
