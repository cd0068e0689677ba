"""One cell: build every implementation, check it, meter its memory, time all of them together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_mone.benchmarking import memory
from megatron_mone.benchmarking.adapters import Adapter, all_adapters
from megatron_mone.benchmarking.adapters.base import Experts
from megatron_mone.benchmarking.adapters.mone import resolve
from megatron_mone.benchmarking.cases import Cell, Inputs, make_inputs
from megatron_mone.benchmarking.checking import Checker, Results
from megatron_mone.benchmarking.machine_limits import PHASES
from megatron_mone.benchmarking.summary import AUTO
from megatron_mone.benchmarking.timing import race
from megatron_mone.kernels.race_results import NUMBERS, Row

IN_SIGHT = 1.3  # of the fastest's time: who is slower is not timed further
WhyOut = Callable[[Adapter, Cell], str | None]
"""One line why an implementation is not raced in a cell, or None."""


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


def run_cell(
    cell: Cell,
    device: torch.device,
    *,
    seconds: float,
    repeats: int,
    why_out: WhyOut = lambda adapter, cell: None,
) -> list[Row]:
    """Race one cell.

    Args:
        cell: checked.
        device: where all tensors live.
        seconds: time for the repeats.
        repeats: at least so many.
        why_out: who is left out, beside those who cannot run.

    Returns:
        One row an implementation, without the limits of the machine.
    """
    inputs = make_inputs(cell, device)
    entries = [_enter(adapter, cell, inputs, device, why_out) for adapter in all_adapters(cell)]
    checker = Checker(cell, inputs)
    for entry in entries:
        if entry.experts is not None:
            _attempt(entry, partial(_meter_and_check, inputs=inputs, checker=checker))
    running = [entry for entry in entries if entry.experts is not None]
    _make_room(running, device)
    # each has run two forward passes and a backward pass
    times = race(
        [_phases(e, inputs) for e in running],
        seconds=seconds,
        least=repeats,
        warm_up=0,
        stays=partial(_in_sight, [entry.adapter.ratio for entry in running]),
    )
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


def _make_room(running: list[Entry], device: torch.device) -> None:
    """Have a CPU's heap hold one free block for what anybody allocates in a pass.

    What the meter's passes freed lies in pieces between what stays; who finds none that is large
    enough in the race would be timed with new pages, which cost more than its products.
    """
    if device.type == "cpu" and running:
        most = max(entry.found["peak_bytes"] for entry in running)
        torch.empty(most + (1 << 20), dtype=torch.uint8).zero_()


def _in_sight(ratios: list[float | None], taken: list[dict[str, list[float]]]) -> list[bool]:
    """Who is near the fastest of its kind in some phase: dense peers, MoNE's backends at one r."""
    near = [False] * len(taken)
    for phase in PHASES:
        least = [min(times[phase]) for times in taken]
        for i, ratio in enumerate(ratios):
            rivals = [ms for ms, other in zip(least, ratios, strict=True) if other == ratio]
            near[i] |= least[i] <= IN_SIGHT * min(rivals)
    return near


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows with their tenth percentiles over the fastest dense peer's of the same run.

    A peer that disagrees with the reference is not asked; without any the ratios are None. In bf16
    the fastest may be one that multiplies in float32 (adapters/in_float32.py).
    """
    peers = [row for row in rows if row.dense and row.agrees]
    if not peers:
        return rows
    forward = min(row.forward_ms_p10 for row in peers)
    both = min(row.forward_backward_ms_p10 for row in peers)

    def compared(row: Row) -> Row:
        ratios = {
            "ratio_to_best_dense": row.forward_backward_ms_p10 / both,
            "ratio_to_best_dense_forward": row.forward_ms_p10 / forward,
        }
        return row.model_copy(update=ratios)

    return [compared(row) if row.available else row for row in rows]


def _enter(
    adapter: Adapter, cell: Cell, inputs: Inputs, device: torch.device, why_out: WhyOut
) -> Entry:
    reason = adapter.why_absent(cell, device) or why_out(adapter, cell)
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


def _meter_and_check(entry: Entry, inputs: Inputs, checker: Checker) -> None:
    """Note memory, errors and, of MoNE, the overlap of the neurons chosen."""
    assert entry.experts is not None
    forward, backward = _halves(entry.experts, inputs)
    given = inputs.shared_storages() | {
        parameter.untyped_storage().data_ptr() for parameter in entry.experts.parameters
    }
    saved = memory.saved_bytes(forward, given)
    entry.adapter.forget()
    kept: list[Tensor] = []

    def keep_output() -> Tensor:
        y_NH = forward()
        kept.append(y_NH.detach())
        return y_NH

    def keep_gradients(y_NH: Tensor) -> None:
        kept.extend(backward(y_NH)[:2])

    peaks = memory.measure_peaks(keep_output, keep_gradients)
    verdict = checker.judge(entry.adapter, Results(*kept))
    entry.reason = verdict.reason
    entry.found |= {
        "error": verdict.error,
        "gradient_error": verdict.gradient_error,
        "overlap": verdict.overlap,
        "agrees": verdict.agrees,
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
