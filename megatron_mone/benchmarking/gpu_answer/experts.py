"""The experts of one layer, as a function that is timed: MoNE's by a backend, and dense ones.

Router and dispatcher are not in it. Shapes: N rows, E experts, F neurons, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_mone.benchmarking.gpu_answer.given import Given
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.gpu_answer_results import DENSE, MONE, REFERENCE, TWO_FOUR
from megatron_mone.kernels.grouped_mlp import grouped_mlp_with_gates
from megatron_mone.kernels.registry import BACKENDS, Call
from megatron_mone.kernels.triton import ops
from megatron_mone.profiling.weighted_swiglu import WeightedSwiGLU

COEFFICIENT = 1e-2
BACKEND = {MONE: "triton", REFERENCE: "reference", TWO_FOUR: "sparse24"}


@dataclass(frozen=True)
class Variant:
    """What of a layer is timed.

    Attributes:
        name: dense, or of BACKEND.
        kept: S.
        block: B.
        groups: G.
        balance_loss: whether the balance loss is made and added to the gradient.
        nan_check: whether bad rows are noted.
    """

    name: str
    kept: int
    block: int = 1
    groups: int = 1
    balance_loss: bool = False
    nan_check: bool = False

    @property
    def label(self) -> str:
        """In words."""
        if self.name == DENSE:
            return DENSE
        extra = [word for word, on in (("balance loss", self.balance_loss),
                                       ("NaN check", self.nan_check)) if on]  # fmt: skip
        return ", ".join([f"{self.name} S {self.kept}, B {self.block}", *extra])

    @property
    def choose(self) -> Selection:
        """The neurons of a row."""
        return Selection(self.kept, self.groups, self.block)

    def why_not(self, given: Given) -> str | None:
        """Why it cannot run on these inputs; None where it can."""
        if self.name == DENSE:
            return None
        call = Call(given.x_NH.device.type, given.x_NH.dtype)
        call = call.sized(given.shape.rows, given.weights[0], self.choose)
        return BACKENDS[BACKEND[self.name]].why_not(call)


class Experts:
    """A layer's experts with inputs that stay where they are, as a graph needs it.

    Args:
        given: inputs of a shape without spare rows.
        variant: what is run.

    Attributes:
        forward: y [N, H].
        leaves: what `passes` differentiates by.
    """

    def __init__(self, given: Given, variant: Variant) -> None:
        self.given, self.variant = given, variant
        self.leaves = given.leaves()
        self.forward: Callable[[], Tensor] = self._mone
        if variant.name == DENSE:
            x_NH, p_N, gate, up, down = self.leaves
            fc1_E2FH = torch.cat((gate, up), dim=1).detach().requires_grad_()
            self.leaves = (x_NH, p_N, fc1_E2FH, down)
            self.offsets_E = given.counts_ER.sum(dim=1).cumsum(0).to(torch.int32)
            self.forward = self._dense
        self.blocks, shape = given.blocks, given.shape
        self.first_EX = given.counts_ER.new_zeros((shape.experts, 3))
        self.loss_scale = torch.ones((), device=given.x_NH.device)

    def passes(self) -> tuple[Tensor, ...]:
        """y, and the gradients by `leaves`."""
        y_NH = self.forward()
        return (y_NH, *torch.autograd.grad(y_NH, self.leaves, self.given.dy_NH))

    def _dense(self) -> Tensor:
        x_NH, p_N, fc1_E2FH, down_EFH = self.leaves
        gate_up_N2F = functional.grouped_mm(x_NH, fc1_E2FH.transpose(1, 2), offs=self.offsets_E)
        h_NF = WeightedSwiGLU.apply(gate_up_N2F, p_N)
        return functional.grouped_mm(h_NF, down_EFH, offs=self.offsets_E)

    def _mone(self) -> Tensor:
        x_NH, p_N, *weights = self.leaves
        variant, shape = self.variant, self.given.shape
        ours = variant.name == MONE
        output = grouped_mlp_with_gates(
            x_NH, p_N, self.given.counts_ER if ours else list(shape.counts), *weights,
            choose=variant.choose, activation="silu", backend=BACKEND[variant.name],
        )  # fmt: skip
        y_NH, entries = output.y_NH, output.entries
        if not (variant.nan_check or variant.balance_loss):
            return y_NH
        if entries is None:
            raise ValueError(f"{variant.label}: this path holds no entries for a loss or a check")
        if variant.nan_check:
            entries.note_bad(p_N.detach(), self.first_EX, 0)
        if variant.balance_loss:
            with torch.no_grad():
                rule = ops.Weighing("selected", shape.neurons, variant.kept, 1 / shape.experts)
                sums = entries.block_sums(
                    self.blocks, shares=True, scale_free=True, weighing=rule
                )  # fmt: skip
            assert sums.weight_BF is not None
            slope = ops.Slope(
                sums.weight_BF, self.blocks, True, COEFFICIENT, lambda: self.loss_scale
            )
            y_NH = entries.attach(y_NH, slope)
        return y_NH
