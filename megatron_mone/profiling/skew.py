"""How ranks differ: by rank, over ranks and nodes, stragglers, imbalance within expert groups.

Touches numpy arrays only. Shapes: R ranks, P phases in the order of common/phases.py; ms.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mone.common.phases import COMMUNICATION, GATE_GEMM, SELECTION, UP_DOWN_GEMM
from megatron_mone.profiling.rank_record import Coordinates
from megatron_mone.profiling.rank_steps import PHASE_NAMES, Aligned, Array, compute_ms

STRAGGLER_EXCESS = 0.10
"""A straggler computes at least this much longer than the median of its pipeline stage."""
EXPERT_PHASES = (GATE_GEMM, SELECTION, UP_DOWN_GEMM)
_COMPUTE = [index for index, phase in enumerate(PHASE_NAMES) if phase not in COMMUNICATION]


@dataclass(frozen=True)
class RankMeans:
    """Each rank's mean over the middle half of the steps.

    Attributes:
        coordinates: one a rank.
        step_ms, compute_ms, rows: [R].
        phase_ms_RP: all passes of a phase together.
        ran: the phases that took any time, in order.
    """

    ranks: list[int]
    hosts: list[str]
    coordinates: list[Coordinates]
    step_ms: Array
    compute_ms: Array
    rows: Array
    phase_ms_RP: Array
    ran: list[str]

    @property
    def stages(self) -> list[int]:
        """Pipeline stage of each rank."""
        return [where.pp for where in self.coordinates]

    def phase(self, name: str) -> Array:
        """[R] ms of one phase."""
        return self.phase_ms_RP[:, PHASE_NAMES.index(name)]


def rank_means(aligned: Aligned) -> RankMeans:
    """Average every rank that has steps of the middle half over them."""
    has_any_R = aligned.rank_weight_RS.any(axis=1)
    ranks = [one for one, has_any in zip(aligned.ranks, has_any_R, strict=True) if has_any]
    phase_ms_RP = aligned.by_rank(aligned.phase_ms_RPQS).sum(axis=2)[has_any_R]
    step_ms = aligned.by_rank(aligned.step_ms_RS)[has_any_R]
    ran_P = aligned.ran_PQ.any(axis=1)
    return RankMeans(
        ranks=[one.rank for one in ranks],
        hosts=[one.host for one in ranks],
        coordinates=[one.coordinates for one in ranks],
        step_ms=step_ms,
        compute_ms=compute_ms(step_ms, phase_ms_RP),
        rows=aligned.by_rank(aligned.rows_RS)[has_any_R],
        phase_ms_RP=phase_ms_RP,
        ran=[phase for phase, ran in zip(PHASE_NAMES, ran_P, strict=True) if ran],
    )


def by_rank(means: RankMeans, peak_bytes: dict[int, int]) -> dict[str, Any]:
    """Columns of one value a rank; `peak_bytes` by rank, null for a rank it lacks."""
    return {
        "rank": means.ranks,
        "host": means.hosts,
        "stage": means.stages,
        "step_ms": means.step_ms.tolist(),
        "compute_ms": means.compute_ms.tolist(),
        "rows": means.rows.tolist(),
        "peak_bytes": [peak_bytes.get(rank) for rank in means.ranks],
        "phases": {phase: means.phase(phase).tolist() for phase in means.ran},
    }


def over_ranks(means: RankMeans) -> dict[str, Any]:
    """Spread of the step and of each phase over ranks."""
    return _spreads(means.step_ms, means.phase_ms_RP, means, means.ranks, "rank")


def over_nodes(means: RankMeans) -> dict[str, Any]:
    """The same over hosts, a host being the mean of its ranks."""
    hosts, host_of_R = np.unique(means.hosts, return_inverse=True)
    mean_HR = (host_of_R == np.arange(len(hosts))[:, None]).astype(np.float64)
    mean_HR /= mean_HR.sum(axis=1, keepdims=True)
    names = [str(host) for host in hosts]
    return _spreads(mean_HR @ means.step_ms, mean_HR @ means.phase_ms_RP, means, names, "host")


def _spreads(
    step_ms: Array, phase_ms: Array, means: RankMeans, names: list[Any], kind: str
) -> dict[str, Any]:
    """One spread for step_ms and one a phase; `names` are the rows' own."""
    columns = {"step_ms": step_ms}
    columns |= {phase: phase_ms[:, PHASE_NAMES.index(phase)] for phase in means.ran}
    return {
        what: {
            "min": float(values.min()),
            "median": float(np.median(values)),
            "max": float(values.max()),
            f"min_{kind}": names[int(values.argmin())],
            f"max_{kind}": names[int(values.argmax())],
        }
        for what, values in columns.items()
    }


def stragglers(means: RankMeans) -> list[dict[str, Any]]:
    """Ranks that compute much longer than the median of their pipeline stage, the worst first."""
    found = []
    stage_R = np.asarray(means.stages)
    for stage in np.unique(stage_R):
        members = np.flatnonzero(stage_R == stage)
        median_ms = float(np.median(means.compute_ms[members]))
        median_P = np.median(means.phase_ms_RP[members], axis=0)
        mean_rows = float(means.rows[members].mean())
        for r in members:
            own_ms = float(means.compute_ms[r])
            if own_ms <= 0 or own_ms < (1 + STRAGGLER_EXCESS) * median_ms:
                continue
            excess_P = (means.phase_ms_RP[r] - median_P)[_COMPUTE]
            found.append(
                {
                    "rank": means.ranks[r],
                    "host": means.hosts[r],
                    "stage": int(stage),
                    "compute_ms": own_ms,
                    "median_ms": median_ms,
                    "phase": PHASE_NAMES[_COMPUTE[int(excess_P.argmax())]],
                    "rows_over_mean": float(means.rows[r]) / mean_rows if mean_rows else 1.0,
                }
            )
    return sorted(found, key=lambda one: one["median_ms"] - one["compute_ms"])


def expert_groups(means: RankMeans) -> list[dict[str, Any]]:
    """Imbalance of rows and of expert time within each expert parallel group.

    A group shares pp and edp: its ranks differ in ep, and in etp where experts are split.
    """
    expert_ms = np.sum([means.phase(phase) for phase in EXPERT_PHASES], axis=0)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for r, where in enumerate(means.coordinates):
        groups[where.pp, where.edp].append(r)
    return [
        {
            "ranks": [means.ranks[r] for r in members],
            "rows_max_over_mean": max_over_mean(means.rows[members]),
            "expert_ms_max_over_mean": max_over_mean(expert_ms[members]),
        }
        for _, members in sorted(groups.items())
    ]


def max_over_mean(values: Array) -> float:
    """1.0 is balance, also of values that are all zero."""
    mean = float(values.mean())
    return float(values.max()) / mean if mean else 1.0
