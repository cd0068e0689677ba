"""Few rows without gradients, where bytes decide."""

import torch

from megatron_mone.benchmarking.gpu_answer.clock import replay_ms, wall_ms
from megatron_mone.benchmarking.gpu_answer.experts import Experts, Variant
from megatron_mone.benchmarking.gpu_answer.given import given
from megatron_mone.benchmarking.gpu_answer.notebook import Notebook
from megatron_mone.benchmarking.gpu_answer.plan import Plan, kept_of
from megatron_mone.kernels.gpu_answer_results import DENSE, MONE, LayerTime


@torch.no_grad()
def run(plan: Plan, device: torch.device, book: Notebook) -> None:
    """Dense and MoNE at r = 1/4, single neurons and one block of S."""
    for shape in plan.decode:
        inputs = given(shape, device)
        quarter = kept_of(shape, 1 / 4)
        for variant in (
            Variant(DENSE, shape.neurons), Variant(MONE, quarter), Variant(MONE, quarter, quarter)
        ):  # fmt: skip
            experts = Experts(inputs, variant)
            forward = wall_ms(experts.forward, device, plan.repeats)
            replay = None
            if device.type == "cuda":
                replay = replay_ms(experts.forward, device, plan.repeats)
            row = LayerTime(
                **shape.keeping(variant.kept).sizes(), name=variant.name, block=variant.block,
                balance_loss=False, nan_check=False, forward_ms=forward,
                forward_backward_ms=None, replay_ms=replay, peak_bytes=None,
            )  # fmt: skip
            book.add(row)
