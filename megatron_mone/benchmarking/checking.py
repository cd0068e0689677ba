"""Whether an implementation gives what the reference gives: outputs, gradients, neurons chosen.

Compared on a sample of the rows, which are independent of each other: the reference computes every
neuron in plain torch, and would take most of a race's time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mone.benchmarking.adapters.base import Adapter
from megatron_mone.benchmarking.adapters.mone import MoNE, chosen_mask, mone_weights
from megatron_mone.benchmarking.cases import Cell, Inputs
from megatron_mone.kernels import mone_grouped_mlp
from megatron_mone.kernels.neuron_mask import NeuronMask

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative norm of an output's difference from the reference's."""
GRADIENT_SLACK = 5.0
"""Gradients of x and probs may differ by this many tolerances: they are longer sums."""
LEAST_OVERLAP = {"fp32": 0.999, "bf16": 0.97}
"""Share of the reference's neurons that a MoNE backend must choose too; near ties may flip."""
SAMPLED_EXPERTS, SAMPLED_ROWS = 8, 128  # at most, and of each


@dataclass(frozen=True)
class Results:
    """Output, and gradients of x and probs."""

    y_NH: Tensor
    dx_NH: Tensor
    dprobs_N: Tensor

    def rows(self, index_M: Tensor) -> "Results":
        """Of some rows."""
        return Results(self.y_NH[index_M], self.dx_NH[index_M], self.dprobs_N[index_M])


@dataclass(frozen=True)
class Verdict:
    """How far results are from the reference's.

    Attributes:
        error, gradient_error: relative norms of differences; None where they are no numbers.
        overlap: share of the reference's neurons that were chosen too.
        agrees: whether all of it is allowed.
        reason: how not, else None.
    """

    error: float | None
    gradient_error: float | None
    overlap: float
    agrees: bool
    reason: str | None


class Checker:
    """The reference on a sample of one cell's rows.

    Args:
        cell: that is raced.
        inputs: of it.
    """

    def __init__(self, cell: Cell, inputs: Inputs) -> None:
        self.cell, self.inputs = cell, inputs
        self.rows_M, self.sample = sample_of(inputs)
        self._dense: Results | None = None

    def judge(self, adapter: Adapter, found: Results) -> Verdict:
        """Compare the results of all rows, given as an adapter computed them."""
        overlap = 1.0
        if isinstance(adapter, MoNE):
            mask = chosen_mask(adapter, self.cell, self.inputs, adapter.backend).rows(self.rows_M)
            expected_mask = chosen_mask(adapter, self.cell, self.sample, "reference")
            overlap = overlap_of(mask, expected_mask)
            expected = self._reference(neuron_mask=mask)
        else:
            if self._dense is None:
                self._dense = self._reference(neurons_per_token=self.cell.neurons)
            expected = self._dense
        return self._verdict(found.rows(self.rows_M), expected, overlap)

    def _reference(self, **choice: Any) -> Results:
        x_MH, probs_M = self.sample.leaves()
        y_MH, _ = mone_grouped_mlp(
            x_MH, probs_M, self.sample.counts, *mone_weights(self.sample), backend="reference",
            **choice,
        )  # fmt: skip
        return Results(
            y_MH.detach(), *torch.autograd.grad(y_MH, [x_MH, probs_M], self.sample.dy_NH)
        )

    def _verdict(self, found: Results, expected: Results, overlap: float) -> Verdict:
        error = distance(found.y_NH, expected.y_NH)
        gradient = max(
            distance(found.dx_NH, expected.dx_NH), distance(found.dprobs_N, expected.dprobs_N)
        )
        limit = TOLERANCE[self.cell.dtype]
        # a NaN fails every comparison, so that it cannot agree
        agrees = error <= limit and gradient <= GRADIENT_SLACK * limit
        agrees = agrees and overlap >= LEAST_OVERLAP[self.cell.dtype]
        reason = (
            f"disagrees with the reference: error {error:.1e} and gradients {gradient:.1e} where "
            f"{limit:g} and {GRADIENT_SLACK * limit:g} are allowed, {overlap:.2%} of its neurons"
        )
        return Verdict(
            _finite(error), _finite(gradient), overlap, agrees, None if agrees else reason
        )


def sample_of(inputs: Inputs) -> tuple[Tensor, Inputs]:
    """Evenly spaced rows of evenly spaced experts: ([M] their places, the inputs of them alone)."""
    experts = _spaced(len(inputs.counts), SAMPLED_EXPERTS)
    first_E = [sum(inputs.counts[:e]) for e in range(len(inputs.counts))]
    rows = [[first_E[e] + i for i in _spaced(inputs.counts[e], SAMPLED_ROWS)] for e in experts]
    rows_M = torch.tensor([row for mine in rows for row in mine], device=inputs.x_NH.device).long()
    return rows_M, Inputs(
        x_NH=inputs.x_NH[rows_M],
        dy_NH=inputs.dy_NH[rows_M],
        probs_N=inputs.probs_N[rows_M],
        counts=[len(mine) for mine in rows],
        gate_up_E2FH=inputs.gate_up_E2FH[experts],
        down_EHF=inputs.down_EHF[experts],
        down_EFH=inputs.down_EFH[experts],
    )


def _spaced(count: int, most: int) -> list[int]:
    """All of `count` places, or `most` from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def distance(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    value, expected = value.detach().double(), expected.double()
    scale = float(expected.norm()) or 1.0
    return float((value - expected).norm()) / scale


def overlap_of(mask: NeuronMask, expected: NeuronMask) -> float:
    """Share of the expected entries that the mask holds; 1 for none."""
    total = expected.num_entries
    return float((mask.to_bool() & expected.to_bool()).sum()) / total if total else 1.0


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
