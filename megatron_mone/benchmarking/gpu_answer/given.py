"""Inputs of a layer's kernels, random and the same each time, on the device they run on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mone.benchmarking.gpu_answer.plan import Shape
from megatron_mone.kernels.triton.availability import available, interpreted
from megatron_mone.kernels.triton.ops import Blocks

SOURCES = 2
"""R: chunks of an expert's rows that a balance loss tells apart."""


def device_here() -> torch.device:
    """The GPU, or the CPU under TRITON_INTERPRET=1.

    Raises:
        RuntimeError: neither, in `available`'s words.
    """
    usable, reason = available()
    if not usable:
        raise RuntimeError(reason)
    return torch.device("cpu" if interpreted() else "cuda")


@dataclass(frozen=True)
class Given:
    """One layer's inputs.

    Attributes:
        shape: of them.
        x_NH, p_N: rows and probabilities; NaN past the experts' rows.
        weights: gate, up and down, [E, F, H] each.
        dy_NH: gradient of the output.
        counts_ER: [E, R] int64 rows of each expert by source.
    """

    shape: Shape
    x_NH: Tensor
    p_N: Tensor
    weights: tuple[Tensor, Tensor, Tensor]
    dy_NH: Tensor
    counts_ER: Tensor

    @property
    def real(self) -> int:
        """Rows of experts."""
        return sum(self.shape.counts)

    @property
    def blocks(self) -> Blocks:
        """For a balance loss: one an expert."""
        experts = torch.arange(self.shape.experts, dtype=torch.int32, device=self.x_NH.device)
        return Blocks(experts.repeat_interleave(SOURCES), 1, self.shape.experts)

    def leaves(self) -> tuple[Tensor, ...]:
        """x, p and the weights, to be differentiated by."""
        tensors = (self.x_NH, self.p_N, *self.weights)
        return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def given(shape: Shape, device: torch.device) -> Given:
    """Inputs of a shape, by a seed of its own."""
    torch.manual_seed(shape.rows + shape.hidden + shape.experts)
    dtype, real = shape.torch_dtype, sum(shape.counts)
    x_NH, dy_NH = (torch.randn(shape.rows, shape.hidden, device=device).to(dtype) for _ in range(2))
    p_N = torch.rand(shape.rows, device=device)
    for tensor in (x_NH, dy_NH, p_N):
        tensor[real:] = torch.nan
    size = (shape.experts, shape.neurons, shape.hidden)
    weights = [
        (torch.randn(size, device=device, dtype=dtype) * shape.hidden**-0.5) for _ in range(3)
    ]
    first = [count // 2 for count in shape.counts]
    counts = [[half, count - half] for half, count in zip(first, shape.counts, strict=True)]
    return Given(
        shape, x_NH, p_N, (weights[0], weights[1], weights[2]), dy_NH,
        torch.tensor(counts, device=device),
    )  # fmt: skip
