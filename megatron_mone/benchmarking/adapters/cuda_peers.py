"""Peers that need CUDA, written against their sources. Not run by this project yet.

Versions read: Transformer Engine 2.x `pytorch.GroupedLinear`, ScatterMoE `parallel_experts.py`,
sonic-moe 0.1.2 `functional/__init__.py`, MegaBlocks `layers/glu.py`. All are checked against the
reference before they are timed, so that one that changed its interface reports itself as failed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mone.benchmarking.adapters.base import Adapter, Experts
from megatron_mone.benchmarking.adapters.torch_experts import WeightedSwiGLU
from megatron_mone.benchmarking.cases import Cell, Inputs, leaf


class CudaPeer(Adapter):
    """A package that runs on CUDA only.

    Attributes:
        bf16_only: whether it takes no other dtype.
    """

    bf16_only = False

    def why_absent(self, cell: Cell, device: torch.device) -> str | None:
        """Package first, then device, then dtype."""
        if (missing := super().why_absent(cell, device)) is not None:
            return missing
        if device.type != "cuda":
            return "it runs on CUDA only, and there is no CUDA device"
        other = self.bf16_only and cell.dtype != "bf16"
        return f"it takes bf16 only, not {cell.dtype}" if other else None


class TransformerEngine(CudaPeer):
    """Two GroupedLinear modules, as Megatron's TEGroupedMLP uses them."""

    name, module, package = "te-grouped", "transformer_engine", "transformer-engine[pytorch]"
    timed = "grouped products and a lean SwiGLU"

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """Its modules on views of the shared weights."""
        from transformer_engine.pytorch import GroupedLinear

        def linear(weight_EOI: Tensor) -> torch.nn.Module:
            experts, outputs, width = weight_EOI.shape
            module = GroupedLinear(
                experts, width, outputs, bias=False, params_dtype=weight_EOI.dtype, device="cuda"
            )
            for e in range(experts):
                getattr(module, f"weight{e}").data = weight_EOI[e]
            return module

        fc1, fc2 = linear(inputs.gate_up_E2FH), linear(inputs.down_EHF)
        counts = inputs.counts

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            return fc2(WeightedSwiGLU.apply(fc1(x_NH, counts), probs_N), counts)

        return Experts(forward, [*fc1.parameters(), *fc2.parameters()])


class ScatterMoE(CudaPeer):
    """ScatterMoE's two ParallelLinear calls, as its GLUMLP makes them."""

    name, module, package = "scattermoe", "scattermoe", "scattermoe (from its repository)"
    timed = "its sort of the rows too"

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """[E, out, in] weights, transposed in the call as its own module does."""
        from scattermoe import flatten_sort_count, parallel_linear

        fc1, fc2 = leaf(inputs.gate_up_E2FH), leaf(inputs.down_EHF)
        expert_of_N1 = inputs.expert_of_N.unsqueeze(-1)

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            order = flatten_sort_count(expert_of_N1, cell.experts)
            rows = parallel_linear(x_NH, fc1.permute(0, 2, 1), 1, *order, grouped_out=True)
            a_NF, u_NF = rows.chunk(2, dim=-1)
            return parallel_linear(
                F.silu(a_NF) * u_NF, fc2.permute(0, 2, 1), 1, *order,
                grouped_in=True, gates=probs_N.to(x_NH.dtype).unsqueeze(-1),
            )  # fmt: skip

        return Experts(forward, [fc1, fc2])


class SonicMoE(CudaPeer):
    """SonicMoE's entry for routing that was decided elsewhere."""

    name, module, package = "sonicmoe", "sonicmoe", "sonic-moe"
    timed = "its routing metadata too"
    bf16_only = True

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """[E, out, in] weights, permuted in the call as transformers does."""
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import moe_general_routing_inputs

        fc1, fc2 = leaf(inputs.gate_up_E2FH), leaf(inputs.down_EHF)
        rows_N = torch.arange(cell.tokens, device=inputs.x_NH.device, dtype=torch.int32)
        expert_of_N = inputs.expert_of_N.int()

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            return moe_general_routing_inputs(
                x_NH, probs_N, rows_N, expert_of_N,
                fc1.permute(1, 2, 0), None, fc2.permute(1, 2, 0), None,
                E=cell.experts,
                stream_id=torch.cuda.current_stream().cuda_stream,
                activation_type=ActivationType.SWIGLU,
                is_inference_mode_enabled=not torch.is_grad_enabled(),
                concat_layout=True,
            )[0]  # fmt: skip

        return Experts(forward, [fc1, fc2])


class MegaBlocks(CudaPeer):
    """MegaBlocks' dropless GLU on grouped GEMMs."""

    name, module, package = "megablocks", "megablocks", "megablocks[gg]"
    timed = "grouped products, probabilities after the experts"
    bf16_only = True

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """Its module with neuron-major weights [E F, H]."""
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.glu import GroupedGLU

        module = GroupedGLU(
            Arguments(
                hidden_size=cell.hidden,
                ffn_hidden_size=cell.neurons,
                moe_num_experts=cell.experts,
                bias=False,
                activation_fn=F.silu,
                mlp_type="glu",
                mlp_impl="grouped",
                memory_optimized_mlp=True,
                fp16=False,
                bf16=True,
                device=inputs.x_NH.device,
            )
        )
        gate_up, neurons = inputs.gate_up_E2FH, inputs.neurons
        module.w1.data = gate_up[:, :neurons].reshape(-1, cell.hidden)
        module.v1.data = gate_up[:, neurons:].reshape(-1, cell.hidden)
        module.w2.data = inputs.down_EFH.reshape(-1, cell.hidden)
        counts = torch.tensor(inputs.counts)

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            return module(x_NH, counts) * probs_N.to(x_NH.dtype).unsqueeze(-1)

        return Experts(forward, [module.w1, module.v1, module.w2])


CUDA_PEERS: tuple[Callable[[], CudaPeer], ...] = (
    TransformerEngine,
    ScatterMoE,
    SonicMoE,
    MegaBlocks,
)
