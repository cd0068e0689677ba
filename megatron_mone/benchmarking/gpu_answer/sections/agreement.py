"""Every kernel against float64, and several runs against each other, bit for bit."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mone.benchmarking.gpu_answer.decode_steps import DecodeSteps
from megatron_mone.benchmarking.gpu_answer.given import given
from megatron_mone.benchmarking.gpu_answer.notebook import Notebook
from megatron_mone.benchmarking.gpu_answer.plan import Plan, Shape
from megatron_mone.benchmarking.gpu_answer.steps import Step, Steps
from megatron_mone.kernels.gpu_answer_results import Agreement

TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}


def run(plan: Plan, device: torch.device, book: Notebook) -> None:
    """A row a kernel and shape."""
    for shape in plan.agree:
        inputs = given(shape, device)
        for steps in (Steps(inputs), DecodeSteps(inputs)):
            for step in steps.all:
                book.add(_row(steps, step, shape, plan.runs))


def _row(steps: Steps | DecodeSteps, step: Step, shape: Shape, runs: int) -> Agreement:
    first = [None if out is None else steps.of(out).clone() for out in step.run()]
    whole = list(step.run())
    again = [_same(steps, first, whole)]
    again += [_same(steps, first, step.run()) for _ in range(runs - 2)]
    errors = step.errors(whole)
    tolerance = TOLERANCE[shape.dtype]
    agrees = all(error <= tolerance for error in errors)  # NaN does not
    worst = max(errors) if all(math.isfinite(error) for error in errors) else None
    return Agreement(
        kernel=step.name, shape=shape.label, error=worst, tolerance=tolerance, agrees=agrees,
        same_bits=all(again),
    )  # fmt: skip


def _same(
    steps: Steps | DecodeSteps, first: Sequence[Tensor | None], now: Sequence[Tensor | None]
) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    pairs = [(a, steps.of(b)) for a, b in zip(first, now, strict=True) if a is not None]
    return all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
