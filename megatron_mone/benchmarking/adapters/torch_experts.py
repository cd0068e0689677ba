"""Dense experts of torch alone: grouped_mm, and a loop of matmuls.

Both keep only the gate and up activations (2 F a row) for the backward and recompute the rest, as a
fused SwiGLU does, so that they are no straw men in memory.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mone.benchmarking.adapters.base import Adapter, Experts
from megatron_mone.benchmarking.cases import Cell, Inputs, leaf
from megatron_mone.profiling.weighted_swiglu import WeightedSwiGLU


class TorchGroupedMM(Adapter):
    """torch.nn.functional.grouped_mm, one call for all experts."""

    name = "torch-grouped-mm"
    timed = "grouped products and a lean SwiGLU"

    def why_absent(self, cell: Cell, device: torch.device) -> str | None:
        """A reason where torch is too old."""
        return None if hasattr(F, "grouped_mm") else "torch has no grouped_mm before 2.10"

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """Weights as linear layers hold them; row offsets are int32, as grouped_mm wants."""
        fc1_E2FH, fc2_EHF = leaf(inputs.gate_up_E2FH), leaf(inputs.down_EHF)
        counts = torch.tensor(inputs.counts, device=inputs.x_NH.device)
        offsets_E = counts.cumsum(0).to(torch.int32)

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            gate_up_N2F = F.grouped_mm(x_NH, fc1_E2FH.transpose(1, 2), offs=offsets_E)
            h_NF = WeightedSwiGLU.apply(gate_up_N2F, probs_N)
            return F.grouped_mm(h_NF, fc2_EHF.transpose(1, 2), offs=offsets_E)

        return Experts(forward, [fc1_E2FH, fc2_EHF])


class TorchLoop(Adapter):
    """A product for each expert."""

    name = "torch-loop"
    timed = "a matmul for each expert, unbound weights, and a lean SwiGLU"

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """Weights as linear layers hold them."""
        fc1_E2FH, fc2_EHF = leaf(inputs.gate_up_E2FH), leaf(inputs.down_EHF)
        counts = inputs.counts

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            gate_up_N2F = _products(x_NH, fc1_E2FH, counts)
            return _products(WeightedSwiGLU.apply(gate_up_N2F, probs_N), fc2_EHF, counts)

        return Experts(forward, [fc1_E2FH, fc2_EHF])


def _products(x_NI: Tensor, w_EOI: Tensor, counts: list[int]) -> Tensor:
    """[N, O]: the rows of each expert times its weights; experts without rows cost nothing."""
    parts = zip(x_NI.split(counts), w_EOI.unbind(), counts, strict=True)
    return torch.cat([x @ w.t() for x, w, count in parts if count])
