"""What came of a calibration: each measured pass beside what is predicted, fitted and held out.

Kept as JSON, schema "megatron-mone/calibration/1". Touches nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_mone.planning.cost.efficiency import Efficiency

SCHEMA = "megatron-mone/calibration/1"
COLUMNS = ("fitted", "without_run", "without_phase")
"""Predictions of a FittedPhase."""


@dataclass(frozen=True)
class FittedPhase:
    """One pass of one phase in one run: seconds of a step, mean over ranks.

    Attributes:
        run, phase, pass_: which.
        measured: in the profile.
        fitted: predicted by the efficiency that is fitted to all.
        without_run, without_phase: by one fitted without this run, or without this phase in any
            run; None where that leaves nothing to fit.
    """

    run: str
    phase: str
    pass_: str
    measured: float
    fitted: float
    without_run: float | None
    without_phase: float | None


@dataclass(frozen=True)
class StepCheck:
    """The whole step of one run, as the planner predicts it for the rank with the most rows.

    Attributes:
        run: which.
        measured, fitted, without_run: as in FittedPhase, in seconds.
        covered: share of the measured step in phases that were fitted.
    """

    run: str
    measured: float
    fitted: float
    without_run: float | None
    covered: float


@dataclass(frozen=True)
class CommunicationCheck:
    """All collectives of a kind and group in a step of one run; not fitted.

    Attributes:
        run, collective: which, as "all_to_all ep".
        measured: seconds, waiting for later ranks included.
        predicted: by the cluster file, if all ranks called together.
    """

    run: str
    collective: str
    measured: float
    predicted: float


@dataclass(frozen=True)
class Calibration:
    """What came of it.

    Attributes:
        efficiency: fitted to everything.
        phases, steps: how well it fits, and what held-out data say.
        communication: what the cluster file says beside what was measured.
        fitted_kinds: of operations, of which there were any.
        left_out: what was not fitted, each with the reason.
    """

    efficiency: Efficiency
    phases: tuple[FittedPhase, ...]
    steps: tuple[StepCheck, ...]
    communication: tuple[CommunicationCheck, ...]
    fitted_kinds: tuple[str, ...]
    left_out: tuple[str, ...]

    def summary(self, column: str) -> dict[str, float] | None:
        """How far one of COLUMNS is from what was measured; None where it has no prediction.

        Returns:
            "median" and "worst" of abs(predicted / measured - 1); "of_time", the sum of what they
            are off over the sum of what was measured; "count" of passes of phases.
        """
        return summary([(one.measured, getattr(one, column)) for one in self.phases])

    def to_json(self) -> dict[str, Any]:
        """A JSON object; seconds."""
        return {
            "schema": SCHEMA,
            "source": self.efficiency.source,
            "fitted_kinds": list(self.fitted_kinds),
            "left_out": list(self.left_out),
            "errors": {column: self.summary(column) for column in COLUMNS},
            "phases": [_record(one) for one in self.phases],
            "steps": [_record(one) for one in self.steps],
            "communication": [_record(one) for one in self.communication],
        }


def summary(pairs: Sequence[tuple[float, float | None]]) -> dict[str, float] | None:
    """How far predictions are from what was measured; see `Calibration.summary`.

    Args:
        pairs: (measured, predicted) seconds; those without a prediction do not count.
    """
    known = np.array([pair for pair in pairs if pair[1] is not None])
    if not len(known):
        return None
    off = np.abs(known[:, 1] - known[:, 0])
    errors = off / known[:, 0]
    return {
        "median": float(np.median(errors)),
        "worst": float(errors.max()),
        "of_time": float(off.sum() / known[:, 0].sum()),
        "count": len(known),
    }


def _record(one: FittedPhase | StepCheck | CommunicationCheck) -> dict[str, Any]:
    return {name.removesuffix("_"): value for name, value in asdict(one).items()}
