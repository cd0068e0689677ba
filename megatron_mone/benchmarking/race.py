"""One cell: build every implementation, check it, meter its memory, time all of them together."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_mone.benchmarking import memory
from megatron_mone.benchmarking.adapters import Adapter, all_adapters
from megatron_mone.benchmarking.adapters.base import Experts
from megatron_mone.benchmarking.adapters.mone import MoNE, chosen_mask, mone_weights, resolve
from megatron_mone.benchmarking.cases import Cell, Inputs, make_inputs
from megatron_mone.benchmarking.summary import AUTO
from megatron_mone.benchmarking.timing import race
from megatron_mone.kernels import mone_grouped_mlp
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.race_results import NUMBERS, Row

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative norm of an output's difference from the reference's."""
GRADIENT_SLACK = 5.0
"""Gradients of x and probs may differ by this many tolerances: they are longer sums."""
LEAST_OVERLAP = {"fp32": 0.999, "bf16": 0.97}
"""Share of the reference's neurons that a MoNE backend must choose too; near ties may flip."""


@dataclass
class Entry:
    """An implementation in the race and what is found out about it.

    Attributes:
        experts: None where it is absent.
        reason: why it is absent, or why it disagrees.
        found: fields of its row.
    """

    adapter: Adapter
    experts: Experts | None = None
    reason: str | None = None
    found: dict[str, Any] = field(default_factory=dict)


def run_cell(cell: Cell, device: torch.device, *, seconds: float, repeats: int) -> list[Row]:
    """Race one cell.

    Args:
        cell: checked.
        device: where all tensors live.
        seconds: time for the repeats.
        repeats: at least so many.

    Returns:
        One row an implementation, without the limits of the machine.
    """
    inputs = make_inputs(cell, device)
    entries = [_enter(adapter, cell, inputs, device) for adapter in all_adapters(cell)]
    references: dict[str, Reference] = {}
    for entry in entries:
        if entry.experts is not None:
            _attempt(entry, partial(_check, cell=cell, inputs=inputs, kept=references))
    references.clear()
    for entry in entries:
        if entry.experts is not None:
            _attempt(entry, partial(_meter, inputs=inputs))
    running = [entry for entry in entries if entry.experts is not None]
    times = race([_phases(e, inputs) for e in running], seconds=seconds, least=repeats)
    for entry, phases in zip(running, times, strict=True):
        for phase, spent in phases.items():
            entry.found |= {
                f"{phase}_ms": spent.median,
                f"{phase}_ms_p10": spent.p10,
                f"{phase}_ms_p90": spent.p90,
                "repeats": spent.repeats,
            }
    rows = [_row(entry) for entry in entries]
    return with_ratios(rows + _auto_rows(rows, cell, device))


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows with their medians over the fastest dense peer's of the same run.

    A peer that disagrees with the reference is not asked; without any the ratios are None. In bf16
    the fastest may be one that multiplies in float32 (adapters/in_float32.py).
    """
    peers = [row for row in rows if row.dense and row.agrees]
    if not peers:
        return rows
    forward = min(row.forward_ms for row in peers)
    both = min(row.forward_backward_ms for row in peers)

    def compared(row: Row) -> Row:
        ratios = {
            "ratio_to_best_dense": row.forward_backward_ms / both,
            "ratio_to_best_dense_forward": row.forward_ms / forward,
        }
        return row.model_copy(update=ratios)

    return [compared(row) if row.available else row for row in rows]


def _enter(adapter: Adapter, cell: Cell, inputs: Inputs, device: torch.device) -> Entry:
    reason = adapter.why_absent(cell, device)
    if reason is not None:
        return Entry(adapter, reason=reason)
    entry = Entry(adapter)
    _attempt(entry, lambda e: setattr(e, "experts", adapter.build(cell, inputs)))
    return entry


def _attempt(entry: Entry, step: Any) -> None:
    """Run a step; whatever a peer's own code raises makes it absent with that reason."""
    try:
        step(entry)
    except Exception as error:
        text = str(error).strip().splitlines()
        entry.reason = f"failed: {type(error).__name__}: {text[0] if text else ''}"[:200]
        entry.experts = None
        entry.found = {}


@dataclass(frozen=True)
class Reference:
    """What the reference gives for some neurons: output, and gradients of x and probs."""

    y_NH: Tensor
    dx_NH: Tensor
    dprobs_N: Tensor


def _check(entry: Entry, cell: Cell, inputs: Inputs, kept: dict[str, Reference]) -> None:
    """Note error, gradient error and, of MoNE, the overlap of the neurons chosen."""
    adapter = entry.adapter
    overlap = 1.0
    if isinstance(adapter, MoNE):
        mask = chosen_mask(adapter, cell, inputs, adapter.backend)
        overlap = overlap_of(mask, chosen_mask(adapter, cell, inputs, "reference"))
        expected = _reference(inputs, neuron_mask=mask)
    else:
        if "dense" not in kept:
            kept["dense"] = _reference(inputs, neurons_per_token=cell.neurons)
        expected = kept["dense"]
    assert entry.experts is not None
    x_NH, probs_N = inputs.leaves()
    y_NH = entry.experts.forward(x_NH, probs_N)
    dx_NH, dprobs_N = torch.autograd.grad(y_NH, [x_NH, probs_N], inputs.dy_NH)
    error = distance(y_NH, expected.y_NH)
    gradient = max(distance(dx_NH, expected.dx_NH), distance(dprobs_N, expected.dprobs_N))
    limit = TOLERANCE[cell.dtype]
    # a NaN fails every comparison, so that it cannot agree
    agrees = error <= limit and gradient <= GRADIENT_SLACK * limit
    agrees = agrees and overlap >= LEAST_OVERLAP[cell.dtype]
    entry.found |= {"error": _finite(error), "gradient_error": _finite(gradient),
                    "overlap": overlap, "agrees": agrees}  # fmt: skip
    if not agrees:
        entry.reason = (
            f"disagrees with the reference: error {error:.1e} and gradients {gradient:.1e} where "
            f"{limit:g} and {GRADIENT_SLACK * limit:g} are allowed, {overlap:.2%} of its neurons"
        )


def distance(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    value, expected = value.detach().double(), expected.double()
    scale = float(expected.norm()) or 1.0
    return float((value - expected).norm()) / scale


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def overlap_of(mask: NeuronMask, expected: NeuronMask) -> float:
    """Share of the expected entries that the mask holds; 1 for none."""
    total = expected.num_entries
    return float((mask.to_bool() & expected.to_bool()).sum()) / total if total else 1.0


def _reference(inputs: Inputs, **choice: Any) -> Reference:
    x_NH, probs_N = inputs.leaves()
    y_NH, _ = mone_grouped_mlp(
        x_NH, probs_N, inputs.counts, *mone_weights(inputs), backend="reference", **choice
    )
    grads = torch.autograd.grad(y_NH, [x_NH, probs_N], inputs.dy_NH)
    return Reference(y_NH.detach(), *grads)


def _meter(entry: Entry, inputs: Inputs) -> None:
    assert entry.experts is not None
    forward, backward = _halves(entry.experts, inputs)
    given = inputs.shared_storages() | {
        parameter.untyped_storage().data_ptr() for parameter in entry.experts.parameters
    }
    saved = memory.saved_bytes(forward, given)
    entry.adapter.forget()
    peaks = memory.measure_peaks(forward, backward)
    entry.found |= {
        "saved_bytes": saved,
        "peak_bytes": peaks.total,
        "peak_forward_bytes": peaks.forward,
        "peak_backward_bytes": peaks.backward,
    }


def _phases(entry: Entry, inputs: Inputs) -> dict[str, Any]:
    assert entry.experts is not None
    experts = entry.experts
    forward, backward = _halves(experts, inputs)

    def forward_alone() -> None:
        with torch.no_grad():
            experts.forward(inputs.x_NH, inputs.probs_N)

    return {"forward": forward_alone, "forward_backward": lambda: backward(forward())}


def _halves(experts: Experts, inputs: Inputs) -> tuple[Any, Any]:
    """(forward with its graph, backward to x, probs and all weights), the same for everybody."""
    x_NH, probs_N = inputs.leaves()
    wanted = [x_NH, probs_N, *experts.parameters]

    def backward(y_NH: Tensor) -> tuple[Tensor, ...]:
        # experts without rows get zeros, as the implementations with fused weights give
        return torch.autograd.grad(y_NH, wanted, inputs.dy_NH, materialize_grads=True)

    return lambda: experts.forward(x_NH, probs_N), backward


def _row(entry: Entry) -> Row:
    adapter = entry.adapter
    facts: dict[str, Any] = {
        "name": adapter.name,
        "dense": adapter.ratio is None,
        "ratio": adapter.ratio,
        "available": entry.experts is not None,
        "agrees": False,
        "reason": entry.reason,
        "timed": adapter.timed,
    }
    return Row(**facts | dict.fromkeys(NUMBERS) | entry.found)


def _auto_rows(rows: list[Row], cell: Cell, device: torch.device) -> list[Row]:
    """What `backend="auto"` takes, a copy of that backend's row: it is not timed twice."""
    taken = {ratio: f"mone-{resolve('auto', cell, device, ratio)}" for ratio in cell.ratios}
    return [
        row.model_copy(update={"name": AUTO, "same_as": row.name})
        for row in rows
        if row.ratio is not None and row.name == taken[row.ratio]
    ]
