"""The arithmetic of a layer's kernels in float64 and plain torch, and how far a result is from it.

Shapes: N real rows grouped by expert, E experts, F neurons, H hidden, K kept entries in all.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mone.kernels.neuron_mask import NeuronMask


def off(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    error = float((got.double() - want.double()).norm())
    return error / (float(want.double().norm()) or 1.0)


def same(got: Tensor, want: Tensor) -> float:
    """0 where integers, bits or copied values are equal; else NaN."""
    return 0.0 if torch.equal(got, want.to(got.dtype)) else math.nan


def rows_by_neurons(x_NH: Tensor, w_EFH: Tensor, counts: Sequence[int]) -> Tensor:
    """[N, F] x W^T."""
    parts = zip(x_NH.double().split(list(counts)), w_EFH, strict=True)
    return torch.cat([x @ w.double().t() for x, w in parts])


def rows_by_hidden(v_NF: Tensor, w_EFH: Tensor, counts: Sequence[int]) -> Tensor:
    """[N, H] v W."""
    parts = zip(v_NF.double().split(list(counts)), w_EFH, strict=True)
    return torch.cat([v @ w.double() for v, w in parts])


def weight_grad(v_NF: Tensor, x_NH: Tensor, counts: Sequence[int]) -> Tensor:
    """[E, F, H] v^T x."""
    parts = (t.double().split(list(counts)) for t in (v_NF, x_NH))
    return torch.stack([v.t() @ x for v, x in zip(*parts, strict=True)])


def kept_of(words_NW: Tensor, neurons: int) -> Tensor:
    """[N, F] bool of the bits."""
    return NeuronMask.of_words(words_NW.contiguous(), neurons).to_bool()


def spread(values_NS: Tensor, kept_NF: Tensor) -> Tensor:
    """[N, F] float64 of the kept entries, 0 elsewhere."""
    wide_NF = torch.zeros(kept_NF.shape, dtype=torch.float64, device=kept_NF.device)
    wide_NF[kept_NF] = values_NS.double().flatten()
    return wide_NF


def sigma(a: Tensor) -> Tensor:
    """silu."""
    return a * torch.sigmoid(a)


def sigma_prime(a: Tensor) -> Tensor:
    """Its derivative."""
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))
