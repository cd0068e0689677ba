"""DeepSpeed's MoE experts: a module for each, on rows padded to the fullest expert's count."""

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mone.benchmarking.adapters.base import Adapter, Experts
from megatron_mone.benchmarking.cases import Cell, Inputs


class GatedExpert(nn.Module):
    """A SwiGLU expert as a DeepSpeed user writes one; DeepSpeed brings none."""

    def __init__(self, hidden: int, neurons: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, 2 * neurons, bias=False, dtype=dtype)
        self.fc2 = nn.Linear(neurons, hidden, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        a, u = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(a) * u)


class DeepSpeedExperts(Adapter):
    """`deepspeed.moe.experts.Experts`; probabilities scale the output, as in its layer."""

    name = "deepspeed"
    timed = "padding to equal counts and back, probabilities after the experts"
    module, package = "deepspeed", "megatron-mone[deepspeed]"

    def why_absent(self, cell: Cell, device: torch.device) -> str | None:
        """Also where it does not import."""
        if (missing := super().why_absent(cell, device)) is not None:
            return missing
        os.environ.setdefault("DS_BUILD_OPS", "0")
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        try:
            import deepspeed.moe.experts  # noqa: F401
        except Exception as error:  # whatever its import runs into is the reason
            return f"deepspeed does not import: {type(error).__name__}: {error}".splitlines()[0]
        return None

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """Its modules on views of the shared weights."""
        from deepspeed.moe.experts import Experts as DeepSpeed

        with torch.device("meta"):
            module = DeepSpeed(
                GatedExpert(cell.hidden, cell.neurons, inputs.x_NH.dtype), cell.experts
            )
        for e, expert in enumerate(module.deepspeed_experts):
            expert.fc1.weight = nn.Parameter(inputs.gate_up_E2FH[e])
            expert.fc2.weight = nn.Parameter(inputs.down_EHF[e])
        capacity = max(inputs.counts)
        slots_N = torch.cat(
            [e * capacity + torch.arange(count) for e, count in enumerate(inputs.counts)]
        ).to(inputs.x_NH.device)
        even = min(inputs.counts) == capacity

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            rows = x_NH
            if not even:
                rows = x_NH.new_zeros(cell.experts * capacity, cell.hidden).index_copy(
                    0, slots_N, x_NH
                )
            out = module(rows.view(1, cell.experts, capacity, cell.hidden))
            out = out.view(-1, cell.hidden)
            y_NH = out if even else out.index_select(0, slots_N)
            return y_NH * probs_N.unsqueeze(-1).to(y_NH.dtype)

        return Experts(forward, list(module.parameters()))
