"""What each type of balance loss is worth on a trained run's gates, as they are and shrunk.

Routing and kept neurons stay what they are, so that only the gates' size differs. Shapes: as in
`moe/balance_loss.py`; a micro-batch is as large as one of training, and all are averaged.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.studies.measuring.held_out import held_out
from megatron_mone.studies.tasks import Found

TYPES = ("raw", "selected", "normalized", "entropy")
BALANCED, SIZE, KEPT = "raw, were its load even", "mean |gate| of kept neurons", "share kept"


def measure(checkpoints: str, windows: int, factors: Sequence[float]) -> list[Found]:
    """Of a run's last checkpoint, in text that it held out.

    Args:
        checkpoints: folder of the run's checkpoints.
        windows: of text, a sequence each.
        factors: that the gates are multiplied by; without any no loss is computed.

    Returns:
        A type of loss without its coefficient, mean over layers, at each factor (x); at factor 1
        what raw would be if every neuron were kept equally often, gates as they are; mean |gate|
        and the share of neurons kept by layer (x), counted from 1.

    Raises:
        ValueError: the run has no checkpoint, or no such text.
    """
    from megatron_mone.evaluation.arguments import checkpoint_of
    from megatron_mone.evaluation.forward import Forward
    from megatron_mone.evaluation.ratio_losses import experts_of, opened

    rows_RS = held_out(checkpoint_of(["--load", checkpoints]), windows)[:, :-1].contiguous()
    seen: dict[int, list[Gates]] = {}
    with opened(Path(checkpoints)) as loaded:
        for before, experts in experts_of(loaded):
            experts.config.mone_backend = "reference"  # which gives the gates of all neurons
            experts.all_gates = True
            experts.register_forward_hook(_keeper(seen.setdefault(before + 1, [])))
        for part_RS in rows_RS.split(loaded.args.micro_batch_size):
            Forward(loaded)(part_RS, lambda logits, tokens: None)
    every = [one for layer in seen.values() for one in layer]
    found: list[Found] = [
        (kind, factors, [_mean(one.loss(kind, factor) for one in every) for factor in factors])
        for kind in TYPES if factors
    ]  # fmt: skip
    layers = list(seen)
    return [
        *found,
        (BALANCED, [1.0], [_mean(one.even() for one in every)]),
        (SIZE, layers, [_mean(one.size() for one in seen[n]) for n in layers]),
        (KEPT, layers, [_mean(one.share() for one in seen[n]) for n in layers]),
    ]


@dataclass(frozen=True)
class Gates:
    """What the experts of a layer made of a micro-batch.

    Attributes:
        gate_NF: gates of all neurons.
        kept_NF: bool.
        expert_N: of each row.
        experts: E.
    """

    gate_NF: Tensor
    kept_NF: Tensor
    expert_N: Tensor
    experts: int

    def loss(self, kind: str, factor: float) -> float:
        """Of a type, by the code that trains, with every gate times a factor."""
        from megatron_mone.kernels import GroupedMLPOutput
        from megatron_mone.kernels.neuron_mask import NeuronMask
        from megatron_mone.moe.balance_loss import BlockStatistics, gate_shares, row_weights

        gate_NF = self.gate_NF * factor
        mask = NeuronMask.from_bool(self.kept_NF)
        output = GroupedMLPOutput(gate_NF, mask, gate_NF[self.kept_NF], gate_NF)
        shares = gate_shares(output, self.expert_N, self.experts, loss_type=kind)
        share_EF, _, total_N = shares.sums()
        weight_EF = row_weights(
            BlockStatistics(self._sums(None), self._sums(self.kept_NF), share_EF), loss_type=kind,
            num_experts=self.experts, num_neurons=gate_NF.shape[1], neurons_per_token=None,
        )  # fmt: skip
        return float(shares.loss(weight_EF, share_EF, total_N))

    def even(self) -> float:
        """1/E * sum over experts of sum_j P_j, P of raw: where f_j = 1 for every neuron."""
        size_E = self._sums(self.gate_NF.abs() * self.kept_NF).sum(1)
        return float((size_E / self._sums(None).clamp(min=1)).sum() / self.experts)

    def size(self) -> float:
        """Mean |gate| of what is kept."""
        return float(self.gate_NF[self.kept_NF].abs().mean())

    def share(self) -> float:
        """Share of neurons kept."""
        return float(self.kept_NF.double().mean())

    def _sums(self, value_NF: Tensor | None) -> Tensor:
        """[E, F] sums over an expert's rows; [E] rows without values."""
        shape = self.expert_N.shape if value_NF is None else value_NF.shape
        value = torch.ones(shape) if value_NF is None else value_NF
        total = torch.zeros(self.experts, *shape[1:], dtype=self.gate_NF.dtype)
        return total.index_add_(0, self.expert_N, value.to(total.dtype))


def _keeper(into: list[Gates]) -> Callable[..., None]:
    """A hook on experts that notes what they made."""

    def keep(experts: Any, given: tuple[Any, ...], output: Any) -> None:
        rows_E = given[1]
        expert_N = torch.arange(len(rows_E)).repeat_interleave(rows_E)
        gate_NF = output.gate_NF.detach().double()
        into.append(Gates(gate_NF, output.mask.to_bool(), expert_N, len(rows_E)))

    return keep


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
