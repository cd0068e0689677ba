"""What the entry points build before a kernel runs. Plain torch.

Arguments are checked once for every backend, in kernels/operands.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mone.kernels.neuron_mask import NeuronMask

ACTIVATIONS = ("silu", "sigmoid", "gelu", "relu")


def expert_of_row(counts: Sequence[int], device: torch.device) -> Tensor:
    """[N] int32 expert of each row."""
    experts = torch.arange(len(counts), dtype=torch.int32)
    return experts.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).to(device)


def neuron_major(w_EFH: Tensor) -> Tensor:
    """The weight as the gathering kernels address it: a neuron's H values adjacent, neurons of an
    expert H apart, experts any whole number of neurons apart (gate and up share a parameter)."""
    hidden = w_EFH.shape[2]
    fits = w_EFH.stride(2) == 1 and w_EFH.stride(1) == hidden and w_EFH.stride(0) % hidden == 0
    return w_EFH if fits else w_EFH.contiguous()


def neurons_apart(w_EFH: Tensor) -> int:
    """Neurons from one expert's first to the next one's, of a `neuron_major` weight."""
    return w_EFH.stride(0) // w_EFH.shape[2]


def uniform_mask(index_NS: Tensor, neurons: int, block: int = 1) -> NeuronMask:
    """The mask of rows that keep S neurons each, in blocks of `block`.

    NeuronMask's own checks are skipped: they copy to the host, and rows made by a kernel ascend.
    """
    rows, kept = index_NS.shape
    offsets_N1 = torch.arange(rows + 1, device=index_NS.device) * kept
    return NeuronMask.unchecked(index_NS.reshape(-1), offsets_N1, neurons, block, kept)


def uniform_rows(mask: NeuronMask) -> Tensor | None:
    """[N, S] neurons of a mask whose rows all keep S > 0, else None. Waits for the device where
    the mask does not know that they do (`kept`)."""
    rows, entries = mask.num_rows, mask.num_entries
    if not rows or not entries or entries % rows:
        return None
    if mask.kept is None and bool((mask.row_lengths_N != entries // rows).any()):
        return None
    return mask.indices_K.contiguous().view(rows, -1)
