"""MoNE's own backends, as the public op runs them."""

from typing import Any

import torch
from torch import Tensor

from megatron_mone.benchmarking.adapters.base import Adapter, Experts
from megatron_mone.benchmarking.cases import DTYPES, Cell, Inputs, leaf
from megatron_mone.kernels import mone_grouped_mlp, resolve_backend
from megatron_mone.kernels.neuron_mask import NeuronMask


class MoNE(Adapter):
    """`mone_grouped_mlp` with a named backend at one ratio."""

    timed = "choosing the neurons too"
    ratio: float

    def __init__(self, backend: str, ratio: float) -> None:
        self.backend, self.ratio, self.name = backend, ratio, f"mone-{backend}"

    def why_absent(self, cell: Cell, device: torch.device) -> str | None:
        """What the backend itself says."""
        try:
            resolve(self.backend, cell, device, self.ratio)
        except ValueError as error:
            return str(error).splitlines()[0]
        return None

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """Gate and up are views of one parameter, as in the layer; neurons are rows."""
        weights = mone_weights(inputs)
        options = self.options(cell)

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            return mone_grouped_mlp(
                x_NH, probs_N, inputs.counts, *weights, backend=self.backend, **options
            )[0]

        return Experts(forward, list(weights))

    def options(self, cell: Cell) -> dict[str, Any]:
        """What is chosen, as keywords of `mone_grouped_mlp`."""
        return {"neurons_per_token": cell.kept(self.ratio), "neuron_block": cell.neuron_block}

    def forget(self) -> None:
        """The CPU kernels keep their work space; given back, the next call allocates it."""
        from megatron_mone.kernels.cpu.products import release_scratch

        release_scratch()


def mone_weights(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(w_gate, w_up, w_down) [E, F, H] leaves."""
    gate_up, neurons = inputs.gate_up_E2FH, inputs.neurons
    return leaf(gate_up[:, :neurons]), leaf(gate_up[:, neurons:]), leaf(inputs.down_EFH)


def resolve(backend: str, cell: Cell, device: torch.device, ratio: float) -> str:
    """The backend that a name stands for in this cell at one ratio.

    Raises:
        ValueError: it cannot run here; says why.
    """
    return resolve_backend(
        backend, activation="silu", dtype=DTYPES[cell.dtype], device=device.type,
        rows=cell.tokens, experts=cell.experts, neurons=cell.neurons, kept_share=ratio,
        block=cell.neuron_block,
    )  # fmt: skip


def chosen_mask(adapter: MoNE, cell: Cell, inputs: Inputs, backend: str) -> NeuronMask:
    """The neurons that `backend` chooses at the adapter's ratio."""
    with torch.no_grad():
        return mone_grouped_mlp(
            inputs.x_NH, inputs.probs_N, inputs.counts, *mone_weights(inputs),
            backend=backend, **adapter.options(cell),
        )[1]  # fmt: skip
