"""Which neurons of an expert to remove: formulas of what was recorded of its rows. Pure.

Shapes: N rows that chose the expert, F neurons, H hidden size. A score is higher for a neuron that
matters more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_QUARTER = 4


@dataclass(frozen=True)
class ExpertRows:
    """An expert and the rows that chose it.

    Attributes:
        x_NH: its input.
        p_N: the router's weight.
        g_NF: gates.
        u_NF: up projections.
        kept_NF: bool, neurons that reach the output.
        w_gate_FH, w_up_FH, w_down_FH: weights.
    """

    x_NH: Tensor
    p_N: Tensor
    g_NF: Tensor
    u_NF: Tensor
    kept_NF: Tensor
    w_gate_FH: Tensor
    w_up_FH: Tensor
    w_down_FH: Tensor

    @property
    def h_NF(self) -> Tensor:
        """What goes into the down projection, without the router's weight."""
        return self.g_NF * self.u_NF * self.kept_NF


def frequency(rows: ExpertRows) -> Tensor:
    """[F] share of rows where a neuron's |g| is of the largest quarter."""
    largest = rows.g_NF.abs().topk(rows.g_NF.shape[1] // _QUARTER, dim=1).indices
    return torch.zeros_like(rows.g_NF).scatter(1, largest, 1.0).mean(0)


def gate(rows: ExpertRows) -> Tensor:
    """[F] mean |g|."""
    return rows.g_NF.abs().mean(0)


def product(rows: ExpertRows) -> Tensor:
    """[F] mean |g u|, 0 where a neuron is not kept."""
    return rows.h_NF.abs().mean(0)


def weight_informed(rows: ExpertRows) -> Tensor:
    """[F] mean |g u| times the norm of the neuron's down vector: WINA's |x_i c_i| (arXiv
    2505.19427, equation 4), which it takes of single tokens, and not for W_down."""
    return product(rows) * rows.w_down_FH.norm(dim=1)


def moe_pruner(rows: ExpertRows) -> Tensor:
    """[F] MoE-Pruner's |W| |X p| (arXiv 2410.12013, equation 9) summed over a neuron's weights.

    |X p| is of an input of the matrix over the rows, each times the router's weight. The paper
    compares and removes single weights of a row of the matrix; here a neuron goes with all of its
    own.
    """
    input_H = (rows.p_N[:, None] * rows.x_NH).norm(dim=0)
    hidden_F = (rows.p_N[:, None] * rows.h_NF).norm(dim=0)
    into_F = (rows.w_gate_FH.abs() + rows.w_up_FH.abs()) @ input_H
    return into_F + rows.w_down_FH.abs().sum(1) * hidden_F


SCORES = {  # the names of catalogue.prune.NEURON_CRITERIA
    "frequency": frequency, "|gate|": gate, "|gate x up|": product,
    "weight-informed": weight_informed, "MoE-Pruner": moe_pruner,
}  # fmt: skip
