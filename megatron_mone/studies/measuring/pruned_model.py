"""A model in this process without some of its experts or neurons: its loss on given text.

Experts are removed by their logit, neurons by zeros for their weights, so that nothing else of the
model changes; the model in memory is as it was after each. Shapes: as in `expert_scores`; R windows
of text.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mone.studies.measuring.expert_scores import routed
from megatron_mone.studies.measuring.neuron_scores import ExpertRows

_BATCH = 32  # rows of a forward pass
Removed = Mapping[int, Sequence[int]]
"""Layer, counted from 1 -> its experts that are removed."""
RemovedNeurons = Mapping[int, Sequence[Sequence[int]]]
"""Layer, counted from 1 -> of each expert its neurons that are removed."""


@dataclass(frozen=True)
class Seen:
    """What was recorded of a layer.

    Attributes:
        logits_TE: of the router.
        weight_TE: of the router, 0 where not chosen.
        output_TEH: of every expert for every token.
        rows: by expert, of the tokens that chose it.
    """

    logits_TE: Tensor
    weight_TE: Tensor
    output_TEH: Tensor
    rows: Sequence[ExpertRows]


class Pruned:
    """A model in this process and what is removed of it.

    Args:
        loaded: with experts of ours.
        rows_RS: windows that losses are of.
    """

    def __init__(self, loaded: Any, rows_RS: Tensor) -> None:
        from megatron_mone.evaluation.forward import Forward
        from megatron_mone.evaluation.ratio_losses import layers_of

        self._forward = Forward(loaded)
        self._rows_RS = rows_RS
        self.window = rows_RS.shape[1] - 1
        self.layers = {number + 1: layer for number, layer in layers_of(loaded)}
        self.topk = loaded.args.moe_router_topk
        self._known: dict[tuple[tuple[int, tuple[int, ...]], ...], float] = {}

    def loss(self) -> float:
        """Nats a token of the model as it is now."""
        from megatron_mone.evaluation.ratio_losses import loss_of

        return loss_of(self._forward, self._rows_RS, _BATCH)

    def without_experts(self, removed: Removed) -> float:
        """Nats a token with tokens routed anew among the experts that are left."""
        asked = tuple((layer, tuple(experts)) for layer, experts in sorted(removed.items()))
        if asked not in self._known:
            with contextlib.ExitStack() as stack:
                for layer, experts in removed.items():
                    stack.enter_context(_closed(self.layers[layer].router, experts))
                self._known[asked] = self.loss()
        return self._known[asked]

    @torch.no_grad()
    def without_neurons(self, removed: RemovedNeurons) -> float:
        """Nats a token with zeros for all weights of some neurons, whose gate then is 0, so that an
        expert that chooses its neurons chooses others."""
        weights = [
            weight
            for layer in removed
            for weight in (
                self.layers[layer].experts.linear_fc1,
                self.layers[layer].experts.linear_fc2,
            )
        ]
        before = [weight.detach().clone() for weight in weights]
        try:
            for layer, by_expert in removed.items():
                experts = self.layers[layer].experts
                for expert, neurons in enumerate(by_expert):
                    experts.linear_fc1[expert, :, list(neurons)] = 0
                    experts.linear_fc2[expert, list(neurons)] = 0
            return self.loss()
        finally:
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)

    def skipping(self, change: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Nats a token, and the share of routed rows left out, with router weights changed.

        Args:
            change: [T, E] weights, tokens of whole windows one after another -> the same.
        """
        counts = [0, 0]

        def changed(
            router: Any, inputs: Any, output: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor]:
            length = inputs[0].shape[0]
            weight_TE = _by_window(output[0], length)
            new_TE = change(weight_TE)
            counts[0] += int(((weight_TE > 0) & (new_TE == 0)).sum())
            counts[1] += int((weight_TE > 0).sum())
            return _by_position(new_TE, length), output[1]

        hooks = [one.router.register_forward_hook(changed) for one in self.layers.values()]
        try:
            return self.loss(), counts[0] / counts[1]
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def record(self, rows_RS: Tensor) -> dict[int, Seen]:
        """What the layers do with some windows, the model as it is.

        Raises:
            ValueError: a router whose weights are not the softmax of its top K logits.
        """
        inputs: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self.layers}

        def keep(layer: int) -> Callable[..., None]:
            def hook(router: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
                length = args[0].shape[0]
                flat = args[0].reshape(-1, args[0].shape[-1])
                inputs[layer].append((_by_window(flat, length), _by_window(output[0], length)))

            return hook

        hooks = [one.router.register_forward_hook(keep(n)) for n, one in self.layers.items()]
        try:
            for part in rows_RS.split(_BATCH):
                self._forward(part[:, :-1].contiguous(), lambda logits, tokens: None)
        finally:
            for hook in hooks:
                hook.remove()
        found = {}
        for layer, parts in inputs.items():
            x_TH, weight_TE = (torch.cat(one) for one in zip(*parts, strict=True))
            found[layer] = _seen(self.layers[layer], x_TH, weight_TE, self.topk)
        return found


def _by_window(flat_TX: Tensor, length: int) -> Tensor:
    """From Megatron's order, positions first, to windows one after another."""
    return flat_TX.view(length, -1, flat_TX.shape[1]).transpose(0, 1).reshape(flat_TX.shape)


def _by_position(flat_TX: Tensor, length: int) -> Tensor:
    """Inverse of `_by_window`."""
    return flat_TX.view(-1, length, flat_TX.shape[1]).transpose(0, 1).reshape(flat_TX.shape)


@contextlib.contextmanager
def _closed(router: Any, experts: Sequence[int]) -> Iterator[None]:
    """A router that gives some experts the logit minus infinity."""

    def gating(inputs: Tensor) -> Tensor:
        logits = type(router).gating(router, inputs)
        logits[..., list(experts)] = -torch.inf
        return logits

    router.gating = gating
    try:
        yield
    finally:
        del router.gating


def _seen(layer: Any, x_TH: Tensor, weight_TE: Tensor, topk: int) -> Seen:
    logits_TE = layer.router.gating(x_TH[:, None])[:, 0].float()
    if not torch.allclose(routed(logits_TE, topk), weight_TE, atol=1e-5):
        raise ValueError(
            "moe_router_pre_softmax, or another rule of the router: weights that are no softmax of "
            "the top K logits are not pruned here; measure a model without it"
        )
    outputs, rows = [], []
    for expert in range(layer.experts.num_local_experts):
        every = _rows(layer.experts, expert, x_TH, weight_TE[:, expert])
        outputs.append(every.h_NF @ every.w_down_FH)
        at = weight_TE[:, expert] > 0
        rows.append(_rows(layer.experts, expert, x_TH[at], weight_TE[at, expert]))
    return Seen(logits_TE, weight_TE, torch.stack(outputs, dim=1), rows)


def _rows(experts: Any, expert: int, x_NH: Tensor, p_N: Tensor) -> ExpertRows:
    from megatron_mone.kernels.activations import gate_activation

    gate_FH, up_FH, down_FH = (
        one[expert].detach() for one in (experts.w_gate_EFH, experts.w_up_EFH, experts.w_down_EFH)
    )
    g_NF = gate_activation(experts.config.mone_activation, x_NH @ gate_FH.T)
    kept_NF = experts.select(g_NF)
    return ExpertRows(x_NH, p_N, g_NF, x_NH @ up_FH.T, kept_NF, gate_FH, up_FH, down_FH)
