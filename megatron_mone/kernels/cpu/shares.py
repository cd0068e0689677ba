"""Native sums over the gates of kept entries, for the balance loss (moe/gate_shares.py).

Shapes: N rows, F neurons, K kept entries, B blocks of rows. Sums are in float32 and do not depend
on the number of threads.
"""

from ctypes import byref

import torch
from torch import Tensor

from megatron_mone.kernels.cpu import native
from megatron_mone.kernels.cpu.backend import available
from megatron_mone.kernels.cpu.products import empty
from megatron_mone.kernels.neuron_mask import NeuronMask

TYPES = (torch.float32, torch.bfloat16)
"""Of gates that the kernels take."""


def usable(gate_K: Tensor) -> bool:
    """Whether the kernels take these gates here."""
    return gate_K.device.type == "cpu" and gate_K.dtype in TYPES and available()[0]


class GateSums:
    """The kernels on one mask's gates.

    Args:
        mask: N rows over F neurons.
        gate_K: [K] float32 or bfloat16 on the CPU.
        block_N: [N] int64 block of each row.
    """

    def __init__(self, mask: NeuronMask, gate_K: Tensor, block_N: Tensor) -> None:
        layout = native.layout([mask.num_rows], mask.num_neurons, 0)
        self.indices_K, self.offsets_N1 = mask.indices_K.contiguous(), mask.offsets_N1.contiguous()
        self.gate_K, self.block_N = gate_K.detach().contiguous(), block_N.contiguous()
        self.rows, self.neurons = mask.num_rows, mask.num_neurons
        self.arguments = (
            byref(layout.shape()), byref(native.mask(self.indices_K, self.offsets_N1)),
            native.address(self.gate_K), self.gate_K.element_size(), native.address(self.block_N),
        )  # fmt: skip

    def row_sums(self, weight_BF: Tensor | None = None) -> Tensor:
        """[N] sums of |g| over the kept neurons, each times its weight where there are weights."""
        out_N = empty((self.rows,), torch.float32)
        weight_BF = None if weight_BF is None else weight_BF.contiguous()
        native.kernels().row_sums(*self.arguments, native.address(weight_BF), out_N.data_ptr())
        return out_N

    def share_sums(self, blocks: int, total_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, F] float32 sums over each block's rows of |g| / total, and int64 kept counts."""
        share_BF = empty((blocks, self.neurons), torch.float32)
        counts_BF = empty((blocks, self.neurons), torch.int64)
        native.kernels().share_sums(
            *self.arguments, blocks, native.address(total_N), share_BF.data_ptr(),
            counts_BF.data_ptr(),
        )  # fmt: skip
        return share_BF, counts_BF

    def slopes(self, weight_BF: Tensor, total_N: Tensor | None, loss_N: Tensor | None) -> Tensor:
        """[K] float32 sign(g) (weight - loss_n) / total_n."""
        out_K, weight_BF = empty(self.gate_K.shape, torch.float32), weight_BF.contiguous()
        native.kernels().share_slopes(
            *self.arguments, native.address(weight_BF), native.address(total_N),
            native.address(loss_N), out_K.data_ptr(),
        )  # fmt: skip
        return out_K
