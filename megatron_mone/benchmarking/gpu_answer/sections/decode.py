"""Few rows without gradients, where bytes decide: by the union of the neurons that rows keep."""

import torch

from megatron_mone.benchmarking.gpu_answer.clock import replay_ms, wall_ms
from megatron_mone.benchmarking.gpu_answer.experts import Experts, Variant
from megatron_mone.benchmarking.gpu_answer.given import Given, given
from megatron_mone.benchmarking.gpu_answer.notebook import Notebook
from megatron_mone.benchmarking.gpu_answer.plan import Plan, kept_of
from megatron_mone.kernels.gpu_answer_results import DENSE, MONE, LayerTime
from megatron_mone.kernels.grouped_mlp import mone_grouped_mlp


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
            if variant.name == MONE:
                share = bytes_to_dense(inputs, variant)
                label = f"weights read, of dense: {shape.label}, B {variant.block}"
                book.fact(**{label: f"{share:.2f}"})
            row = LayerTime(
                **shape.keeping(variant.kept).sizes(), name=variant.name, block=variant.block,
                balance_loss=False, nan_check=False, forward_ms=forward,
                forward_backward_ms=None, replay_ms=replay, peak_bytes=None,
            )  # fmt: skip
            book.add(row)


def bytes_to_dense(inputs: Given, variant: Variant) -> float:
    """Bytes of weights that are read, of those that dense experts with as many rows read: the gate,
    and of up and down the neurons that some row of the expert keeps."""
    shape = inputs.shape
    _, mask = mone_grouped_mlp(
        inputs.x_NH, inputs.p_N, inputs.counts_ER, *inputs.weights, neurons_per_token=variant.kept,
        neuron_block=variant.block, backend="triton",
    )  # fmt: skip
    parts = mask.to_bool()[: inputs.real].split(list(shape.counts))
    some = sum(int(part.any(dim=0).sum()) for part in parts)
    dense = sum(count > 0 for count in shape.counts) * shape.neurons
    return (dense + 2 * some) / (3 * dense)
