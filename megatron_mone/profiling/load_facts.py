"""What was routed and kept while steps were timed: rows of each expert, load of each neuron.

A time is never quoted without them. May touch: forward hooks on experts, the load
counters of MoNE layers (read only). Shapes: L MoE layers, E_l experts and F_l neurons of this rank,
E experts of all ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_mone.moe.layer import MoNELayer
from megatron_mone.moe.neuron_load import relative_load, summarise_counts
from megatron_mone.profiling.deepspeed_moe import DeepSpeedMoE


class LoadFacts:
    """Counts of one run's MoE layers over the steps that `end_step` closes.

    Args:
        layers: of this rank, in order.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._layers = layers
        # Rows of the step under way: each [E_l], of a DeepSpeed layer [E], of this rank's tokens.
        self._step = [_zeros(layer) for layer in layers]
        # Rows with their padding, of a DeepSpeed layer: of the step under way, and of all.
        self._computing = [0] * len(layers)
        self._computed = [0] * len(layers)
        self._steps: list[Tensor] = []  # each [L, E_l]
        self._kept: list[Tensor | None] = [None] * len(layers)  # [F_l, E_l] of MoNE layers
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Start counting rows."""
        for number, layer in enumerate(self._layers):
            if isinstance(layer, DeepSpeedMoE):
                self._undo += layer.watch_rows(*self._deepspeed_counters(number))
                continue
            experts: Any = layer.experts
            handle = experts.register_forward_pre_hook(self._counter(number))
            self._undo.append(handle.remove)

    def detach(self) -> None:
        """Stop."""
        while self._undo:
            self._undo.pop()()

    def _counter(self, number: int) -> Callable[[Any, tuple], None]:
        def count(_experts: Any, inputs: tuple) -> None:
            # Without gradients: evaluation, or the first pass of a recomputed layer.
            if torch.is_grad_enabled():
                rows_E = self._step[number]
                rows_E += inputs[1].to(rows_E.device)

        return count

    def _deepspeed_counters(
        self, number: int
    ) -> tuple[Callable[[Tensor], None], Callable[[int], None]]:
        def routed(rows_E: Tensor) -> None:
            if torch.is_grad_enabled():
                self._step[number] += rows_E

        def computed(rows: int) -> None:
            if torch.is_grad_enabled():
                self._computing[number] += rows

        return routed, computed

    def begin_step(self) -> None:
        """Forget what an unmeasured step left behind."""
        self._computing = [0] * len(self._layers)
        for rows_E in self._step:
            rows_E.zero_()

    def end_step(self) -> None:
        """Keep the counts of the step; before the layers' own end of step. Collective where a layer
        is DeepSpeed's."""
        if self._layers:
            pairs = zip(self._layers, self._step, strict=True)
            rows = [x.local(n) if isinstance(x, DeepSpeedMoE) else n for x, n in pairs]
            self._steps.append(torch.stack(rows))
            self._computed = [a + b for a, b in zip(self._computed, self._computing, strict=True)]
        for number, layer in enumerate(self._layers):
            if isinstance(layer, MoNELayer):
                counts_EF = layer.neuron_balancer.load.step_counts_EF
                before = self._kept[number]
                self._kept[number] = counts_EF.clone() if before is None else before + counts_EF

    def rows(self) -> list[int]:
        """Routed rows of this rank in each step."""
        return [int(rows_LE.sum()) for rows_LE in self._steps]

    def computed(self) -> dict[int, int]:
        """Layer -> rows that its experts computed over all steps, padding included; of those layers
        that pad."""
        return {
            layer_number(layer): rows
            for layer, rows in zip(self._layers, self._computed, strict=True) if rows
        }  # fmt: skip

    def routing(self) -> dict[str, Any]:
        """The `routing` object of a rank record: rows of each expert over all steps."""
        total_LE = sum(self._steps[1:], self._steps[0]).tolist() if self._steps else []
        return {
            "layers": [
                {
                    "layer": layer_number(layer),
                    "first_expert": layer.local_expert_indices[0],
                    "rows": rows_E,
                }
                for layer, rows_E in zip(self._layers, total_LE, strict=bool(total_LE))
            ]
        }

    def neurons(self) -> dict[str, Any] | None:
        """The `neurons` object of a rank record; None for a stock model."""
        measured = [
            (layer, kept_EF, rows)
            for layer, kept_EF, rows in zip(
                self._layers, self._kept, self.routing()["layers"], strict=bool(self._steps)
            )
            if kept_EF is not None
        ]
        if not measured:
            return None
        return {
            "layers": [_neuron_facts(layer, kept, rows["rows"]) for layer, kept, rows in measured]
        }


def layer_number(layer: MoELayer) -> int:
    """1-based, MTP layers after the decoder's."""
    assert layer.layer_number is not None
    return layer.layer_number + (layer.config.num_layers if layer.is_mtp_layer else 0)


def _neuron_facts(layer: MoELayer, kept_EF: Tensor, rows: list[int]) -> dict[str, Any]:
    kept_EF, rows_E = kept_EF.cpu(), torch.tensor(rows)
    used_EF = kept_EF[rows_E > 0]
    return {
        "layer": layer_number(layer),
        "rows": sum(rows),
        "kept": int(kept_EF.sum()),
        "width": kept_EF.shape[1],
        "dead": int((used_EF == 0).sum()),
        "max_over_mean": float(relative_load(used_EF).max()) if used_EF.numel() else 0.0,
        "histogram": [int(n) for n in summarise_counts(kept_EF, rows_E).histogram],
    }


def _zeros(layer: MoELayer) -> Tensor:
    parameter = next(layer.parameters())
    counted = layer.num_local_experts
    if isinstance(layer, DeepSpeedMoE):
        counted = layer.config.num_moe_experts
    return torch.zeros(counted, dtype=torch.int64, device=parameter.device)
