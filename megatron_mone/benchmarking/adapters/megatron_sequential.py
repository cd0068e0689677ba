"""Megatron-Core's own SequentialMLP, with its fused SwiGLU as `--swiglu` training runs it."""

import tempfile
from typing import Any

import torch
from torch import Tensor

from megatron_mone.benchmarking.adapters.base import Adapter, Experts
from megatron_mone.benchmarking.cases import Cell, Inputs


class MegatronSequential(Adapter):
    """Stock experts, on a CPU under the emulation (which does not compile the fused SwiGLU)."""

    name = "megatron-sequential"
    timed = "one MLP for each expert"
    module, package = "megatron.core", "megatron-core"

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """Stock modules on views of the shared weights."""
        start_one_rank()
        from megatron.core.models.backends import LocalSpecProvider
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            **swiglu_experts(cell.hidden, cell.neurons, cell.experts),
            params_dtype=inputs.x_NH.dtype,
            perform_initialization=False,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        experts: Any = LocalSpecProvider().grouped_mlp_modules(False)(
            cell.experts, config, pg_collection=groups
        )
        for e, expert in enumerate(experts.local_experts):
            expert.linear_fc1.weight.data = inputs.gate_up_E2FH[e]
            expert.linear_fc2.weight.data = inputs.down_EHF[e]
        counts = torch.tensor(inputs.counts)

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            return experts(x_NH, counts, probs_N)[0]

        return Experts(forward, list(experts.parameters()))


def swiglu_experts(hidden: int, neurons: int, experts: int) -> dict[str, Any]:
    """Fields of Megatron's configuration: one layer of experts as `--swiglu` training has them."""
    return {
        "num_layers": 1,
        "hidden_size": hidden,
        "num_attention_heads": 1,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": neurons,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": True,
    }


def start_one_rank() -> None:
    """This process as the only rank of a Megatron job, once."""
    if not torch.cuda.is_available():
        from megatron_mone import cpu_emulation

        cpu_emulation.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        with tempfile.TemporaryDirectory() as folder:
            store = torch.distributed.FileStore(f"{folder}/store", 1)
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
            parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
