"""Forward, forward with backward, and peak memory of a layer's experts."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch

from megatron_mone.benchmarking.gpu_answer.clock import replay_ms, wall_ms
from megatron_mone.benchmarking.gpu_answer.experts import Experts, Variant
from megatron_mone.benchmarking.gpu_answer.given import given
from megatron_mone.benchmarking.gpu_answer.notebook import Notebook
from megatron_mone.benchmarking.gpu_answer.plan import Plan, Shape, kept_of
from megatron_mone.kernels.gpu_answer_results import DENSE, MONE, REFERENCE, TWO_FOUR, LayerTime


def run(plan: Plan, device: torch.device, book: Notebook) -> None:
    """The most telling first: what is cut is what is left."""
    for shape in plan.layers:
        inputs = given(shape, device)
        of_shape = variants(plan, shape, reference=shape is plan.layers[0])
        for variant in islice(of_shape, plan.variants):
            if (reason := variant.why_not(inputs)) is not None:
                book.note(f"{variant.label} at {shape.label}: not run: {reason}")
                continue
            try:
                experts = Experts(inputs, variant)
                book.add(timed(experts, plan, device))
            except Exception as error:
                label = f"{variant.label} at {shape.label}"
                book.note(f"{label}: {type(error).__name__}: {' '.join(str(error).split())}")
                if device.type == "cuda":
                    torch.cuda.synchronize()  # a device that is lost ends the section
            experts = None


def variants(plan: Plan, shape: Shape, *, reference: bool) -> Iterator[Variant]:
    """Dense, MoNE without and with what a training step adds, blocks, and other r."""
    yield Variant(DENSE, shape.neurons)
    quarter = kept_of(shape, 1 / 4)
    yield Variant(MONE, quarter)
    yield Variant(MONE, quarter, quarter)
    yield Variant(MONE, quarter, balance_loss=True, nan_check=True)
    yield Variant(TWO_FOUR, shape.neurons // 2, groups=shape.neurons // 4)
    yield Variant(MONE, quarter, quarter // 2)
    yield Variant(MONE, kept_of(shape, 1 / 4, plan.block), plan.block)
    for ratio in plan.ratios:
        if (kept := kept_of(shape, ratio)) != quarter:
            yield Variant(MONE, kept)
            yield Variant(MONE, kept, kept)
    yield Variant(MONE, quarter, balance_loss=True)
    yield Variant(MONE, quarter, nan_check=True)
    if reference:
        yield Variant(REFERENCE, quarter)


def timed(experts: Experts, plan: Plan, device: torch.device) -> LayerTime:
    """The row of one variant."""
    variant, shape = experts.variant, experts.given.shape
    forward = wall_ms(experts.forward, device, plan.repeats)
    both = wall_ms(experts.passes, device, plan.repeats)
    replay = peak = None
    if device.type == "cuda":
        peak = _peak(experts.passes)
        if variant.name in (DENSE, MONE):  # the others wait for the host, or may
            replay = replay_ms(experts.passes, device, plan.repeats)
    return LayerTime(
        **shape.keeping(variant.kept).sizes(), name=variant.name, block=variant.block,
        balance_loss=variant.balance_loss, nan_check=variant.nan_check, forward_ms=forward,
        forward_backward_ms=both, replay_ms=replay, peak_bytes=peak,
    )  # fmt: skip


def _peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
