"""The CPU kernels' sums over the gates of kept entries, without values: each is one op, as it is
one call of kernels/cpu/shares.py. Only jobs of CPU ranks have it, where those kernels are built.
May touch: the Recorder that listens.
Shapes: N rows, F neurons, K kept entries, B blocks of rows.
"""

import torch
from torch import Tensor

from megatron_mone.kernels.cpu import shares as native
from megatron_mone.kernels.cpu.backend import available
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.planning.tracing.stand_ins.op import note

ROW_SUMS, SHARE_SUMS, SLOPES = "mone.row_sums", "mone.share_sums", "mone.share_slopes"


class GateSums:
    """kernels.cpu.shares.GateSums; an op reads gates, indices, offsets, blocks, and the rest."""

    def __init__(self, mask: NeuronMask, gate_K: Tensor, block_N: Tensor) -> None:
        self.neurons, self.gate_K = mask.num_neurons, gate_K.detach()
        self._inputs = (self.gate_K, mask.indices_K, mask.offsets_N1, block_N)

    def row_sums(self, weight_BF: Tensor | None = None) -> Tensor:
        """See kernels.cpu.shares.GateSums."""
        out_N = self._empty(self._inputs[3].shape[0])
        self._note(ROW_SUMS, (weight_BF,), out_N)
        return out_N

    def share_sums(self, blocks: int, total_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """See kernels.cpu.shares.GateSums."""
        share_BF = self._empty(blocks, self.neurons)
        counts_BF = torch.empty_like(share_BF, dtype=torch.int64)
        self._note(SHARE_SUMS, (total_N,), share_BF, counts_BF)
        return share_BF, counts_BF

    def slopes(self, weight_BF: Tensor, total_N: Tensor | None, loss_N: Tensor | None) -> Tensor:
        """See kernels.cpu.shares.GateSums."""
        out_K = self._empty(*self.gate_K.shape)
        self._note(SLOPES, (weight_BF, total_N, loss_N), out_K)
        return out_K

    def _empty(self, *shape: int) -> Tensor:
        return self.gate_K.new_empty(shape, dtype=torch.float32)

    def _note(self, name: str, given: tuple[Tensor | None, ...], *outputs: Tensor) -> None:
        note(name, [*self._inputs, *(one for one in given if one is not None)], outputs)


def sums_of(gate_K: Tensor) -> type | None:
    """GateSums where the kernels would sum such gates; None where torch would."""
    return GateSums if gate_K.dtype in native.TYPES and available()[0] else None
