"""The implementations that race, one adapter each."""

from megatron_mone.benchmarking.adapters.base import Adapter
from megatron_mone.benchmarking.adapters.cuda_peers import CUDA_PEERS
from megatron_mone.benchmarking.adapters.deepspeed_experts import DeepSpeedExperts
from megatron_mone.benchmarking.adapters.in_float32 import InFloat32
from megatron_mone.benchmarking.adapters.megatron_sequential import MegatronSequential
from megatron_mone.benchmarking.adapters.mone import MoNE
from megatron_mone.benchmarking.adapters.torch_experts import TorchGroupedMM, TorchLoop
from megatron_mone.benchmarking.adapters.transformers_moe import TransformersGroupedMM
from megatron_mone.benchmarking.cases import Cell
from megatron_mone.kernels import BACKENDS


def all_adapters(cell: Cell) -> list[Adapter]:
    """Dense peers, in bf16 cells those of CPUs in float32 too, then every MoNE backend at every
    ratio of the cell."""
    dense: list[Adapter] = [
        MegatronSequential(),
        TorchGroupedMM(),
        TorchLoop(),
        TransformersGroupedMM(),
        DeepSpeedExperts(),
    ]
    wide = [InFloat32(peer) for peer in dense] if cell.dtype == "bf16" else []
    dense += [*wide, *(peer() for peer in CUDA_PEERS)]
    return dense + [MoNE(name, ratio) for ratio in cell.ratios for name in BACKENDS]
