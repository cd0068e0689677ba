"""MoNELayer: Megatron's MoE layer whose routed experts choose their neurons.

May touch: Megatron's MoELayer, the files of this folder. Process groups come from `pg_collection`.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mone.moe.neuron_balancer import NeuronBalancer
from megatron_mone.moe.token_dispatcher import rows_by_source


class MoNELayer(MoELayer):
    """Mixture of experts with selected neurons.

    1. route tokens to experts (stock router)
    2. dispatch tokens to the ranks of their experts (stock dispatcher)
    3. experts: gate every neuron, select, compute the selected ones (MoNEExperts)
    4. attach the neuron-granular balance loss (NeuronBalancer)
    5. combine (stock dispatcher), add shared experts
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.neuron_balancer = NeuronBalancer(
            config, self.experts, pg_collection, is_mtp_layer=is_mtp_layer
        )

    def routed_experts_compute(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Steps 3 and 4 on the dispatched rows; see MoELayer.routed_experts_compute."""
        rows, tokens_per_expert, row_probs = self.token_dispatcher.dispatch_postprocess(
            hidden_states, probs
        )
        output = self.experts(rows, tokens_per_expert, row_probs)
        y_NH = output.y_NH
        if self.training and torch.is_grad_enabled():
            # Off in evaluation and in the first pass of a recomputed layer, as in Megatron's
            # router, so that a recompute changes no statistic.
            y_NH = self.neuron_balancer(
                output,
                rows_by_source(self.token_dispatcher, tokens_per_expert),
                layer_number=self.layer_number,
                local_tokens=self._local_tokens(),
            )
        return self.token_dispatcher.combine_preprocess(y_NH), None

    def _local_tokens(self) -> int:
        """Tokens this rank holds of the micro-batch, [s / (TP * CP)] * b."""
        sequence, batch, _ = self.token_dispatcher.hidden_shape
        return sequence * batch
