"""How many kernels a layer is, and how long none of them runs."""

from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_mone.benchmarking.gpu_answer.experts import Experts, Variant
from megatron_mone.benchmarking.gpu_answer.given import given
from megatron_mone.benchmarking.gpu_answer.notebook import Notebook
from megatron_mone.benchmarking.gpu_answer.plan import Plan, kept_of
from megatron_mone.kernels.gpu_answer_results import DENSE, MONE, Gaps

WARM_UP = 3


def run(plan: Plan, device: torch.device, book: Notebook) -> None:
    """A forward and backward pass as Python runs it; nothing without a GPU."""
    if device.type != "cuda":
        book.note("kernels and gaps need a GPU: not measured")
        return
    inputs, quarter = given(plan.one, device), kept_of(plan.one, 1 / 4)
    for variant in (
        Variant(DENSE, plan.one.neurons),
        Variant(MONE, quarter),
        Variant(MONE, quarter, balance_loss=True, nan_check=True),
        Variant(MONE, quarter, quarter),
    ):
        experts = Experts(inputs, variant)
        for _ in range(WARM_UP):
            experts.passes()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            experts.passes()
            torch.cuda.synchronize()
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in found.events() or ()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        busy, span = busy_and_span(spans)
        book.add(
            Gaps(name=variant.label, kernels=len(spans), busy_ms=busy / 1e3, span_ms=span / 1e3)
        )


def busy_and_span(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """How long at least one of the spans lasts, and from the first start to the last end."""
    busy, first, last = 0.0, None, 0.0
    for start, end in sorted(spans):
        if first is None:
            first = last = start
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy, last - (first or 0.0)
