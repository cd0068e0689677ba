"""Fits all curves of a device together to the seconds of phases, each the sum of many operations.

    phase = sum over its operations of curve[kind].seconds, at least launches x kernel_seconds

By curve_fit.py's method: least squares on the logarithm of the seconds, with a prior on the start.
A phase counts by its share of the step, so that small ones do not decide. Touches nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_mone.common.device import Device
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.roofline import Curve, Operation
from megatron_mone.planning.fitting.curve_fit import (
    PRIOR,
    free_parameters,
    least_squares,
    with_parameters,
)


@dataclass(frozen=True)
class PhaseTime:
    """One pass of one phase in one run.

    Attributes:
        run, phase, pass_: which.
        seconds: measured, of a step; above 0.
        operations: what it consists of -> how often a step, not always whole: a mean over ranks.
    """

    run: str
    phase: str
    pass_: str
    seconds: float
    operations: Mapping[Operation, float]


class PhaseModel:
    """Predicts phases under any curves; the operations of a kind are costed once a curve.

    Args:
        phases: at least one.
        device: that they were measured on.
    """

    def __init__(self, phases: Sequence[PhaseTime], device: Device) -> None:
        self._device = device
        found: dict[str, dict[Operation, int]] = {}
        for one in phases:
            for operation in one.operations:
                kind = found.setdefault(operation.kind, {})
                kind.setdefault(operation, len(kind))
        self._operations = {kind: list(places) for kind, places in found.items()}
        self._counts = {
            kind: np.array([[one.operations.get(op, 0.0) for op in ops] for one in phases])
            for kind, ops in self._operations.items()
        }
        self._launches = np.sum([counts.sum(axis=1) for counts in self._counts.values()], axis=0)
        self._known: dict[str, tuple[Curve, NDArray[np.float64]]] = {}

    @property
    def kinds(self) -> list[str]:
        """The kinds of operations that there are, sorted."""
        return sorted(self._operations)

    def seconds(self, efficiency: Efficiency) -> NDArray[np.float64]:
        """[phases] predicted."""
        total = np.zeros(len(self._launches))
        for kind in self._operations:
            total += self._of_kind(kind, efficiency.curves[kind])
        return np.maximum(total, self._launches * efficiency.kernel_seconds)

    def _of_kind(self, kind: str, curve: Curve) -> NDArray[np.float64]:
        known = self._known.get(kind)
        if known is None or known[0] != curve:
            each = [curve.seconds(operation, self._device) for operation in self._operations[kind]]
            known = self._known[kind] = curve, self._counts[kind] @ np.array(each)
        return known[1]


def fit_phases(phases: Sequence[PhaseTime], device: Device, start: Efficiency) -> Efficiency:
    """The efficiency nearest to measured phases.

    Args:
        phases: at least one, each with an operation.
        device: that they were measured on.
        start: parameters that are 0 and curves of kinds that no phase has are kept.

    Raises:
        ValueError: the device has no peak for a product's type.
    """
    model = PhaseModel(phases, device)
    measured = np.array([one.seconds for one in phases])
    weights = np.sqrt(measured * len(measured) / measured.sum())
    parts = [free_parameters(start.curves[kind]) for kind in model.kinds]
    if start.kernel_seconds:
        parts.append(np.log([start.kernel_seconds]))
    origin = np.concatenate(parts)
    ends = np.cumsum([len(part) for part in parts])

    def efficiency(free: NDArray[np.float64]) -> Efficiency:
        pieces = np.split(free, ends)
        curves = {
            kind: with_parameters(start.curves[kind], piece)
            for kind, piece in zip(model.kinds, pieces, strict=False)
        }
        host = float(np.exp(pieces[len(model.kinds)][0])) if start.kernel_seconds else 0.0
        # A phase does not tell what a launch costs from what its nodes of autograd do.
        return replace(
            start.without_host(), curves={**start.curves, **curves}, kernel_seconds=min(1.0, host)
        )

    def residuals(free: NDArray[np.float64]) -> NDArray[np.float64]:
        off = np.log(model.seconds(efficiency(free)) / measured)
        return np.concatenate([weights * off, np.sqrt(PRIOR) * (free - origin)])

    return efficiency(least_squares(residuals, origin))
