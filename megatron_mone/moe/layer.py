"""MoNELayer: Megatron's MoE layer whose routed experts choose their neurons.

May touch: Megatron's MoELayer, the files of this folder. Process groups come from `pg_collection`.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import (
    MoELayer,
    MoESubmodules,
    _RecordExpertDgradCompletion,
)
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from megatron_mone.config import MoNEConfig
from megatron_mone.config_checks import captures_experts
from megatron_mone.kernels import GroupedMLPOutput
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.moe import faults
from megatron_mone.moe.dispatch.build import build_dispatcher
from megatron_mone.moe.dispatch.carrier import MaskCarrier
from megatron_mone.moe.dispatch.flex import check_flex_packages
from megatron_mone.moe.experts import MoNEExperts
from megatron_mone.moe.finite_check import FiniteCheck
from megatron_mone.moe.masks.tape import MaskTape
from megatron_mone.moe.metrics import install_tracker
from megatron_mone.moe.neuron_balancer import NeuronBalancer
from megatron_mone.moe.neuron_load import LoadSummary
from megatron_mone.moe.padding import unmark_padding
from megatron_mone.moe.recompute import RecomputeMasks, in_recompute


class MoNELayer(MoELayer):
    """Mixture of experts with selected neurons.

    1. route tokens to experts (stock router); keep which are padding
    2. dispatch tokens, and masks where some are replayed, to the ranks of their experts
    3. experts: gate every neuron, select or take the mask, compute the kept ones (MoNEExperts)
    4. attach the neuron-granular balance loss (NeuronBalancer)
    5. combine (stock dispatcher), add shared experts
    """

    config: MoNEConfig
    experts: MoNEExperts  # type: ignore[assignment]
    token_dispatcher: MaskCarrier

    def __init__(
        self,
        config: MoNEConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        check_flex_packages(config)
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.token_dispatcher = build_dispatcher(
            self.num_local_experts, self.local_expert_indices, config, pg_collection
        )
        if self.shared_expert_overlap and self.shared_experts is not None:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        self.neuron_balancer = NeuronBalancer(
            config, self.experts, pg_collection, is_mtp_layer=is_mtp_layer
        )
        self.neuron_load = self.neuron_balancer.load
        self.finite_check = FiniteCheck(
            self.local_expert_indices[0], self._table_number, lasting=captures_experts(config)
        )
        self.recompute_masks = RecomputeMasks()
        self.mask_tape = MaskTape(config, pg_collection)
        self.mask_tape.follow_config(lambda: install_tracker().step() if self.training else None)
        self._bytes_reported = (0, 0)
        self._routing_map: Tensor | None = None  # of the forward under way, while it is recorded
        self._padding_T: Tensor | None = None  # of the forward under way, while it is counted
        install_tracker().register(self)

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Step 1; see MoELayer.route. `padding_mask` is [s, b], True for padding."""
        self._padding_T = None
        if padding_mask is not None and self.training and torch.is_grad_enabled():
            self._padding_T = padding_mask.reshape(-1).bool()
        return super().route(hidden_states, padding_mask)

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Start of step 2; see MoELayer.preprocess."""
        if self.mask_tape.active and not in_recompute():
            sequence, batch, _ = hidden_states.shape
            self._routing_map = routing_map.clone()  # padding_for_quantization writes to it
            layer = self._table_number()
            if layer is None:
                raise ValueError(
                    "layer_number = None: masks are recorded and replayed by layer; give the layer "
                    "its number (set_layer_number)"
                )
            self.token_dispatcher.set_mask(
                self.mask_tape.begin(routing_map, sequence, batch, layer)
            )
        if self._padding_T is not None:
            probs = self.token_dispatcher.mark_padding(probs, self._padding_T)
        return super().preprocess(hidden_states, probs, routing_map)

    def routed_experts_compute(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Steps 3 and 4 on the dispatched rows; see MoELayer.routed_experts_compute."""
        if self.config.overlap_dispatch_backward_with_experts_wgrad:
            hidden_states = _RecordExpertDgradCompletion.apply(
                self._delayed_wgrad_event, hidden_states
            )
        rows, tokens_per_expert, row_probs = self.token_dispatcher.dispatch_postprocess(
            hidden_states, probs
        )
        padding_N = None
        if self._padding_T is not None:
            row_probs, padding_N = unmark_padding(row_probs)
        mask = self.token_dispatcher.take_mask()
        if mask is None:
            mask = self.recompute_masks.take(rows.shape[0], self.experts.w_gate_EFH.shape[1])
        # Off in evaluation and in the first pass of a recomputed layer, as in Megatron's router, so
        # that a recompute changes no statistic.
        balanced = self.training and torch.is_grad_enabled()
        rows_E = self.token_dispatcher.rows_on_device(tokens_per_expert)
        rows_ER = self.token_dispatcher.rows_by_source(tokens_per_expert) if balanced else None
        output = self.experts(rows, rows_E, row_probs, mask, rows_ER)
        if self.config.mone_check_for_nan:
            self.finite_check(output.y_NH, row_probs, rows_E, output.entries)
        self.recompute_masks.keep(output.mask)
        self._record(output.mask)
        y_NH = output.y_NH
        if rows_ER is not None:
            y_NH = self.balance(output, rows_ER, row_probs, padding_N)
        return self.token_dispatcher.combine_preprocess(y_NH), None

    def balance(
        self,
        output: GroupedMLPOutput,
        rows_ER: Tensor,
        row_probs: Tensor,
        padding_N: Tensor | None = None,
    ) -> Tensor:
        """Step 4: the experts' y [N, H], the balance loss attached to its gradient."""
        real_N = row_probs > 0 if self._pads_rows() else None
        if padding_N is not None:
            real_N = ~padding_N if real_N is None else real_N & ~padding_N
        return self.neuron_balancer(
            output,
            rows_ER,
            layer_number=self.layer_number,
            local_tokens=self._local_tokens(),
            real_N=real_N,
            padding_T=self._padding_T,
        )

    def end_step(self) -> None:
        """After the optimizer step, on every rank; raises what faults.look does."""
        faults.look()  # where the optimizer skipped its step
        self.neuron_balancer.end_step()
        self.experts.end_step()
        self.recompute_masks.clear()
        self.mask_tape.end_step()

    def forget_step(self) -> None:
        """Count the step anew; see metrics.TrackedLayer."""
        self.neuron_load.forget_step()
        self.finite_check.forget()

    def table_row(self) -> int | None:
        """Of the metrics table; see metrics.TrackedLayer."""
        return self.neuron_balancer.table_row()

    def summary(self) -> LoadSummary:
        """Collective over the stage; see metrics.TrackedLayer."""
        return self.neuron_balancer.summary()

    def bytes_sent(self) -> tuple[int, int]:
        """For choosing neurons over ranks, and for carrying masks; see metrics.TrackedLayer."""
        now = (self.experts.select.traffic.total, self.token_dispatcher.bytes_carried)
        since, self._bytes_reported = self._bytes_reported, now
        return now[0] - since[0], now[1] - since[1]

    def _record(self, mask: NeuronMask) -> None:
        if self.mask_tape.records and not in_recompute():
            assert self._routing_map is not None
            self.mask_tape.record(self.token_dispatcher.return_mask(mask, self._routing_map))
            self._routing_map = None

    def _pads_rows(self) -> bool | None:
        """Whether Megatron adds rows of probability 0 to even out the experts."""
        config = self.config
        return config.moe_pad_expert_input_to_capacity or config.moe_router_padding_for_quantization

    def _table_number(self) -> int | None:
        """1-based, MTP layers after the decoder's; None for a layer built without a number."""
        if self.layer_number is None:
            return None
        return self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0)

    def _local_tokens(self) -> int:
        """Tokens this rank holds of the micro-batch, [s / (TP * CP)] * b."""
        sequence, batch, _ = self.token_dispatcher.hidden_shape
        return sequence * batch
