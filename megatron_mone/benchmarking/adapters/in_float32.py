"""A dense peer of a bf16 cell that multiplies in float32.

A processor without bf16 units multiplies float32 faster: whoever has bf16 rows there is better off
with experts in float32, and that is what MoNE in bf16 has to be compared with.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_mone.benchmarking.adapters.base import Adapter, Experts
from megatron_mone.benchmarking.cases import Cell, Inputs
from megatron_mone.kernels.race_results import IN_FLOAT32


class InFloat32(Adapter):
    """Another peer with weights, activations and gradients of weights in float32."""

    def __init__(self, peer: Adapter) -> None:
        self.peer = peer
        self.name = f"{peer.name}{IN_FLOAT32}"
        self.timed = f"{peer.timed}; rows converted to float32 and back"

    def why_absent(self, cell: Cell, device: torch.device) -> str | None:
        """The peer's reason, or that bf16 is no slower there."""
        if device.type != "cpu":
            return "multiplies bf16 no slower than float32"
        return self.peer.why_absent(replace(cell, dtype="fp32"), device)

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """The peer on weights converted before the clock starts."""
        experts = self.peer.build(replace(cell, dtype="fp32"), inputs.in_float32)

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            return experts.forward(x_NH.float(), probs_N).to(x_NH.dtype)

        return Experts(forward, experts.parameters)

    def forget(self) -> None:
        """As the peer."""
        self.peer.forget()
