"""Ties the balance loss to a layer: which rows belong together, what is attached, what is logged.

May touch: Megatron's aux-loss scaler, the metrics tracker, the process groups it is given.
Shapes: N routed rows, E_l local experts, R source ranks, M micro-batches among them.
"""

from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_mone.config import MoNEConfig, neurons_per_token
from megatron_mone.kernels import GroupedMLPOutput
from megatron_mone.kernels.triton import KeptEntries
from megatron_mone.kernels.triton.ops import Blocks, Counters, Slope, Weighing, weigh
from megatron_mone.moe.balance_loss import BlockStatistics, gate_shares, row_weights
from megatron_mone.moe.dispatch.row_sources import SourceMap, build_source_map, cell_of_row
from megatron_mone.moe.experts import MoNEExperts
from megatron_mone.moe.gate_shares import kept_counts
from megatron_mone.moe.metrics import install_tracker
from megatron_mone.moe.neuron_load import LoadSummary, NeuronLoad, summarise


class NeuronBalancer:
    """The balance loss, the selection bias and the load counters of one MoNE layer.

    Args:
        config: with mone_* fields.
        experts: of this layer, for its neuron counts and its selection bias.
        pg_collection: `tp`, `cp`, `tp_cp`, `tp_ep`, `expt_tp`, `expt_dp` are used.
        is_mtp_layer: whether the layer belongs to a multi-token-prediction block.
    """

    def __init__(
        self,
        config: MoNEConfig,
        experts: MoNEExperts,
        pg_collection: ProcessGroupCollection,
        *,
        is_mtp_layer: bool,
    ) -> None:
        self.config = config
        self.experts = experts
        self.is_mtp_layer = is_mtp_layer
        self.tp_cp_group = pg_collection.tp_cp
        self.tp_ep_group = pg_collection.tp_ep
        self.expt_dp_group = pg_collection.expt_dp
        self.layer_number: int | None = None
        self.has_loss = config.mone_ng_loss_type != "bias" and config.mone_ng_loss_coeff > 0
        self.by_microbatch = config.mone_ng_loss_scope == "micro_batch"
        self.kept = neurons_per_token(config) if config.mone_selection == "topk" else None
        self.source_map: SourceMap = build_source_map(
            tp_cp_group=pg_collection.tp_cp,
            tp_ep_group=pg_collection.tp_ep,
            expt_tp_group=pg_collection.expt_tp,
            expt_dp_group=pg_collection.expt_dp,
            etp_major=config.moe_token_dispatcher_type == "alltoall",
        )
        neurons = experts.w_gate_EFH.shape[1]
        device = experts.w_gate_EFH.device
        self.load = NeuronLoad(experts.num_local_experts, neurons, device)
        count = experts.num_local_experts
        self.block_of_cell = torch.tensor(self.source_map.block_of_cell(count, parted=True))
        self.expert_of_cell = torch.tensor(self.source_map.block_of_cell(count, parted=False))
        self.microbatch_of_rank = torch.tensor(self.source_map.microbatch_of_rank)
        self._tables: dict[tuple[int, torch.device], Tensor] = {}
        # Scope global_batch: sums over this step's rows here, and the micro-batches in them.
        self.step_sums: Tensor | None = None  # [E, 1 + 2 F_l], BlockStatistics.of_columns
        self.step_microbatches = 0

    def __call__(
        self,
        output: GroupedMLPOutput,
        rows_ER: Tensor,
        *,
        layer_number: int | None,
        local_tokens: int,
        real_N: Tensor | None = None,
        padding_T: Tensor | None = None,
    ) -> Tensor:
        """Count the kept neurons, and return y with the balance loss attached to its gradient.

        Args:
            output: of the experts.
            rows_ER: [E_l, R] rows per local expert and source, in row order.
            layer_number: 1-based, for the log.
            local_tokens: tokens of the micro-batch on this rank.
            real_N: [N] bool, False for rows that Megatron padded or that are of padding; None where
                there are none.
            padding_T: [T] bool, True for this rank's tokens under Megatron's padding mask; None
                where it has none, on every rank of the expert group alike.
        """
        self.layer_number = layer_number
        y_NH = output.y_NH
        tokens_M = self._real_tokens(padding_T)
        parted = self.by_microbatch or tokens_M is not None
        if output.entries is not None:
            return self._by_kernels(
                output.entries, y_NH, rows_ER, real_N, tokens_M, local_tokens, parted
            )
        block_N, rows_B = self._blocks(rows_ER, y_NH.shape[0], parted, real_N)
        num_blocks = rows_B.numel()
        bounded = self.config.moe_expert_rank_capacity_factor is not None  # N is a bound
        has_outside = bounded or real_N is not None
        if not self.has_loss:
            self.load.add(kept_counts(output, block_N, num_blocks, has_outside), rows_B)
            return y_NH
        shares = gate_shares(
            output,
            block_N,
            num_blocks,
            loss_type=self.config.mone_ng_loss_type,
            has_outside=has_outside,
            activation=self.config.mone_activation,
            etp_group=self.experts.etp_group,
        )
        share_BF, counts_BF, total_N = shares.sums()
        if shares.mask is not output.mask:  # of all neurons
            counts_BF = kept_counts(output, block_N, num_blocks, has_outside)
        self.load.add(counts_BF, rows_B)
        dtype = share_BF.dtype
        statistics = BlockStatistics(rows_B.to(dtype), counts_BF.to(dtype), share_BF)
        if self.by_microbatch:
            whole = statistics.summed(self.source_map.replica_group)
            weight_BF = self._weights(whole, 1.0)
        else:
            weight_BF = self._last_weights(tokens_M)
            self._keep_for_next(statistics.columns(), tokens_M)
        loss = shares.loss(weight_BF, share_BF, total_N)
        repeats = self._repeats()
        self._record(loss / repeats)
        if tokens_M is not None:
            loss = shares.loss(_times_tokens(weight_BF, tokens_M), share_BF, total_N)
        loss = loss / repeats * self.config.mone_ng_loss_coeff
        if self.config.calculate_per_token_loss and tokens_M is None:
            # Cancels the division by all tokens, as TopKRouter.attach_and_log_load_balancing_loss.
            loss = loss * (local_tokens * self.tp_cp_group.size())
        return MoEAuxLossAutoScaler.apply(y_NH, loss)

    @torch.no_grad()
    def _by_kernels(
        self, entries: KeptEntries, y_NH: Tensor, rows_ER: Tensor, real_N: Tensor | None,
        tokens_M: Tensor | None, local_tokens: int, parted: bool,
    ) -> Tensor:  # fmt: skip
        """The same by the kernels that hold the entries: two launches, one more where a block lies
        on several ranks; the slope of the loss is added where the gates' gradient is made."""
        cells = self._table(self.block_of_cell if parted else self.expert_of_cell, rows_ER)
        within = self.source_map.num_microbatches if parted else 1
        blocks = Blocks(cells, within, self.experts.num_local_experts * within, real_N)
        loss_type = self.config.mone_ng_loss_type
        scale_free = loss_type != "raw"
        repeats = self._repeats()
        group = self.source_map.replica_group
        whole_here = group is None or group.size() == 1
        weighing = None
        if self.has_loss:
            assert self.kept is not None  # rows of several lengths have no entries
            weighing = Weighing(
                loss_type, self.config.moe_ffn_hidden_size, self.kept,
                1 / (self.config.num_moe_experts or 1), 1 / repeats,
                install_tracker().cell(*self._logged_as(), y_NH.device, self.tp_cp_group),
                None if self.by_microbatch else self._last_weights(tokens_M),
            )  # fmt: skip
        sums = entries.block_sums(
            blocks, shares=self.has_loss, scale_free=scale_free,
            counters=Counters(self.load.step_counts_EF, self.load.step_rows_E),
            weighing=weighing if whole_here or not self.by_microbatch else None,
        )  # fmt: skip
        if weighing is None:
            return y_NH
        weight_BF = sums.weight_BF
        if not self.by_microbatch:
            self._keep_for_next(sums.sums_BX, tokens_M)
        elif not whole_here:
            whole_BX = sums.sums_BX.clone()
            torch.distributed.all_reduce(whole_BX, group=group)
            weight_BF, _ = weigh(sums, whole_BX, weighing)
        assert weight_BF is not None
        scale = self.config.mone_ng_loss_coeff / repeats
        if tokens_M is not None:
            weight_BF = _times_tokens(weight_BF, tokens_M)
        elif self.config.calculate_per_token_loss:
            scale *= local_tokens * self.tp_cp_group.size()
        slope = Slope(weight_BF, blocks, scale_free, scale, partial(_loss_scale, y_NH.device))
        with torch.enable_grad():
            return entries.attach(y_NH, slope)

    def _last_weights(self, tokens_M: Tensor | None) -> Tensor:
        """[B, F_l] weights of the whole last step, 0 in the first one; with `tokens_M` blocks are
        parted by micro-batch."""
        weight_BF = self.experts.ng_weights
        assert weight_BF is not None
        if tokens_M is None:
            return weight_BF
        return weight_BF.repeat_interleave(tokens_M.numel(), dim=0)

    def _keep_for_next(self, sums_BX: Tensor, tokens_M: Tensor | None) -> None:
        """Add a micro-batch's columns of statistics to this step's, which weigh in the next."""
        if tokens_M is not None:  # blocks of an expert lie together
            sums_BX = sums_BX.unflatten(0, (self.experts.num_local_experts, -1)).sum(dim=1)
        if self.step_sums is None:
            self.step_sums = sums_BX
        else:
            self.step_sums.add_(sums_BX)
        # the replicas of an expert hold the rows of all DP ranks' micro-batches together
        ranks = self.tp_ep_group.size() * self.expt_dp_group.size()
        self.step_microbatches += ranks // self.tp_cp_group.size()

    def _repeats(self) -> int:
        """Uses of the layer in a forward pass: its loss counts once a repetition, as the
        router's."""
        if self.is_mtp_layer and self.config.mtp_use_repeated_layer:
            return self.config.mtp_num_layers or 1
        return 1

    def _real_tokens(self, padding_T: Tensor | None) -> Tensor | None:
        """[M] tokens of each source micro-batch that are no padding, where the loss needs them.

        With a loss per token Megatron divides the gradient by all tokens that are no padding; the
        loss of a micro-batch is multiplied by its own, as the router's is.
        """
        if padding_T is None or not (self.has_loss and self.config.calculate_per_token_loss):
            return None
        tokens = (~padding_T).sum().view(1)
        torch.distributed.all_reduce(tokens, group=self.tp_cp_group)
        parts = [torch.empty_like(tokens) for _ in range(self.tp_ep_group.size())]
        torch.distributed.all_gather(parts, tokens, group=self.tp_ep_group)
        tokens_M = tokens.new_zeros(self.source_map.num_microbatches)
        of_rank = self._table(self.microbatch_of_rank, tokens)
        return tokens_M.index_copy_(0, of_rank, torch.cat(parts))

    def _blocks(
        self, rows_ER: Tensor, rows: int, parted: bool, real_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Blocks are local expert * M + micro-batch where they are `parted`, else experts.

        Returns:
            [N] block of each row, B for one that is not real; [B] real rows of each block.
        """
        block_X = self._table(self.block_of_cell if parted else self.expert_of_cell, rows_ER)
        block_N = block_X[cell_of_row(rows_ER, rows)]
        none = self.experts.num_local_experts
        if parted:
            none *= self.source_map.num_microbatches
        rows_of_B = rows_ER.new_zeros(none + 1)
        if real_N is None:
            rows_of_B.index_add_(0, block_X[:-1], rows_ER.flatten())
        else:
            block_N = block_N.masked_fill(~real_N, none)
            rows_of_B.index_add_(0, block_N, torch.ones_like(block_N))
        return block_N, rows_of_B[:-1]

    def _table(self, numbers: Tensor, like: Tensor) -> Tensor:
        """Numbers of the layout where `like` is; they go to a device once."""
        key = (id(numbers), like.device)
        if key not in self._tables:
            self._tables[key] = numbers.to(like.device)
        return self._tables[key]

    def _weights(self, statistics: BlockStatistics, rows_per_share: float) -> Tensor:
        return row_weights(
            statistics,
            loss_type=self.config.mone_ng_loss_type,
            num_experts=self.config.num_moe_experts,
            num_neurons=self.config.moe_ffn_hidden_size,
            neurons_per_token=self.kept,
            rows_per_share=rows_per_share,
            etp_group=self.experts.etp_group,
        )

    def table_row(self) -> int | None:
        """0-based row of the layer among decoder, then MTP layers; None before its first use."""
        if self.layer_number is None:
            return None
        return self.layer_number - 1 + (self.config.num_layers if self.is_mtp_layer else 0)

    def _logged_as(self) -> tuple[str, int | None, int]:
        """Name, 1-based number of the layer, number of layers; over the ranks of one micro-batch
        the parts add up, DP ranks average."""
        row = self.table_row()
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        return "ng_loss", None if row is None else row + 1, layers

    def _record(self, loss: Tensor) -> None:
        name, number, layers = self._logged_as()
        install_tracker().record(
            name, loss, number, layers, reduce_group=self.tp_cp_group,  # type: ignore[arg-type]
        )  # fmt: skip

    @torch.no_grad()
    def end_step(self) -> None:
        """After the optimizer step: move the selection bias, turn the step's sums into weights."""
        bias_EF = self.experts.neuron_bias
        if bias_EF is not None:
            counts_EF = self.load.step_counts_EF.clone()
            torch.distributed.all_reduce(counts_EF, group=self.expt_dp_group)
            total_E1 = counts_EF.sum(dim=1, keepdim=True)
            torch.distributed.all_reduce(total_E1, group=self.experts.etp_group)
            error_EF = total_E1 - counts_EF * self.config.moe_ffn_hidden_size
            bias_EF += torch.sign(error_EF) * self.config.mone_ng_bias_update_rate
        self.load.end_step()
        if self.step_sums is not None:
            sums = BlockStatistics.of_columns(self.step_sums).summed(self.expt_dp_group)
            idle_E1 = sums.rows_B.unsqueeze(1) == 0
            if self.config.mone_ng_loss_type == "entropy":
                sums = sums.with_uniform_row(self.config.moe_ffn_hidden_size)
            weights_EF = self._weights(sums, float(self.step_microbatches))
            assert self.experts.ng_weights is not None
            self.experts.ng_weights.copy_(weights_EF.masked_fill(idle_E1, 0))
            self.step_sums, self.step_microbatches = None, 0

    def summary(self) -> LoadSummary:
        """Load facts since the last call, over all ranks of this stage."""
        counts_EF, rows_E = self.load.take_window()
        return summarise(
            counts_EF,
            rows_E,
            expt_dp_group=self.expt_dp_group,
            tp_ep_group=self.tp_ep_group,
            etp_size=self.experts.etp_group.size(),
        )


def _times_tokens(weight_BF: Tensor, tokens_M: Tensor) -> Tensor:
    """The weights of a micro-batch's part times its own tokens."""
    tokens_B1 = tokens_M.to(weight_BF.dtype).repeat(weight_BF.shape[0] // tokens_M.numel())
    return weight_BF * tokens_B1.unsqueeze(1)


def _loss_scale(device: torch.device) -> Tensor:
    """What MoEAuxLossAutoScaler multiplies the gradient of a loss by; asked for in backward."""
    scale = MoEAuxLossAutoScaler.main_loss_backward_scale
    return torch.ones((), device=device) if scale is None else scale
