"""The kernels of few rows (D1 to D3) as steps, like those of a layer in steps.py.

Checked at any number of rows; a step's inputs are what the kernels before it made.
"""

import torch
from torch import Tensor

from megatron_mone.benchmarking.gpu_answer import float64 as exact
from megatron_mone.benchmarking.gpu_answer.float64 import off, same, spread
from megatron_mone.benchmarking.gpu_answer.given import Given
from megatron_mone.benchmarking.gpu_answer.steps import SILU, Outputs, Step
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.triton import decode, ops
from megatron_mone.kernels.triton.row_map import row_map


class DecodeSteps:
    """Of one layer.

    Args:
        given: its inputs.

    Attributes:
        all: the steps, in order.
    """

    def __init__(self, given: Given) -> None:
        self.given, self.counts, self.F = given, given.shape.counts, given.shape.neurons
        gate, up, _ = given.weights
        self.where = row_map(given.counts_ER, given.shape.rows, decode.TILE)
        self.products = decode.DecodeProducts(self.where, SILU)
        self.entries = ops.select(
            self.products.gate(given.x_NH, gate), Selection(given.shape.kept), SILU, self.where
        )
        self.kept_NF = exact.kept_of(self.of(self.entries.words_NW), self.F)
        self.some_EF = torch.stack(
            [part.any(dim=0) for part in self.kept_NF.split(list(self.counts))]
        )
        _, self.h = self.products.up(given.x_NH, up, given.p_N, self.entries)
        self.all = [
            Step("D1 gate", lambda: (self.products.gate(given.x_NH, gate),),
                 lambda out: [off(self.of(out[0]), self._wide(gate))]),
            Step("D3 union", self._union, self._union_errors),
            Step("D3 up", self._up, self._up_errors),
            Step("D3 down", self._down, self._down_errors),
        ]  # fmt: skip

    def of(self, tensor: Tensor | None) -> Tensor:
        """The real rows."""
        assert tensor is not None
        rows = self.given.shape.rows
        return tensor[: self.given.real] if tensor.shape[:1] == (rows,) else tensor

    def _wide(self, w_EFH: Tensor) -> Tensor:
        return exact.rows_by_neurons(self.of(self.given.x_NH), w_EFH, self.counts)

    @property
    def _there_EF(self) -> Tensor:
        """Places that the union fills, first ones first."""
        places = torch.arange(self.F, device=self.some_EF.device)
        return places < self.some_EF.sum(dim=1, keepdim=True)

    def _by_rows(self, of_EF: Tensor) -> Tensor:
        counts = self.given.counts_ER.sum(dim=1)
        return of_EF.repeat_interleave(counts, dim=0)

    def _union(self) -> Outputs:
        """Number, and neurons where there are any: the rest is unwritten."""
        made = decode.union_of(self.entries.words_NW, self.F, self.where)
        return made.number_E, made.neurons_EF[self._there_EF]

    def _union_errors(self, out: Outputs) -> list[float]:
        number_E, neurons = out
        assert number_E is not None
        assert neurons is not None
        return [
            same(number_E, self.some_EF.sum(dim=1)),
            same(neurons, self.some_EF.nonzero()[:, 1]),
        ]

    def _up(self) -> Outputs:
        """h over the union, without what is unwritten."""
        _, h = self.products.up(
            self.given.x_NH, self.given.weights[1], self.given.p_N, self.entries
        )
        return (self.of(h.of_NX)[:, : self.F][self._by_rows(self._there_EF)],)

    @property
    def _h_NF(self) -> Tensor:
        g_NF = exact.sigma(spread(self.of(self.entries.a_NS), self.kept_NF))
        p_N1 = self.of(self.given.p_N).double()[:, None]
        return p_N1 * g_NF * self._wide(self.given.weights[1]) * self.kept_NF

    def _up_errors(self, out: Outputs) -> list[float]:
        assert out[0] is not None
        return [off(out[0], self._h_NF[self._by_rows(self.some_EF)])]

    def _down(self) -> Outputs:
        bad_N = self.entries.bad_N
        return self.products.down(self.h, self.given.weights[2], bad_N), bad_N

    def _down_errors(self, out: Outputs) -> list[float]:
        y_NH = exact.rows_by_hidden(self._h_NF, self.given.weights[2], self.counts)
        return [off(self.of(out[0]), y_NH), same(self.of(out[1]), self.of(out[1]) * 0)]
