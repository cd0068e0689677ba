"""Megatron's alltoall and allgather dispatchers, carrying a neuron mask with each pair.

The contract is MaskCarrier's. Without a mask they are the stock dispatchers: no other call, no
other byte. May touch: Megatron's dispatchers, NeuronMask.

Shapes: as in carrier.py, and E_l experts of this rank, R source ranks of the expert group
(ETP x EP), C rows of an expert's capacity.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from torch import Tensor

from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.moe.dispatch.carrier import MaskCarrier, check_rows


class MaskAlltoAllTokenDispatcher(MaskCarrier, MoEAlltoAllTokenDispatcher):
    """The alltoall dispatcher with masks; each stage moves the mask as it moves the tokens.

    1. dispatch_preprocess: rows come permuted; add empty ones where Megatron pads
    2. token_dispatch: all-to-all over EP with the tokens' splits
    3. dispatch_postprocess: gather over ETP, sort by local expert
    """

    capacity: int  # type: ignore[assignment]  # Megatron sets it in `preprocess`
    rows_E: Tensor
    rows_RE: Tensor  # [R, E_l], or [EP, 1] where `rows_by_source` gathers the rest

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cudagraph_attrs += ["rows_E", "rows_RE"]

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """See MoEAlltoAllTokenDispatcher; keeps the counts before they go to the host."""
        counted = super().preprocess(routing_map)
        sources, experts = self.tp_size * self.ep_size, self.num_local_experts
        if self.drop_and_pad:
            self.rows_RE = torch.full(
                (sources, experts), self.capacity, dtype=torch.long, device=routing_map.device
            )
            self.rows_E = self.rows_RE.sum(dim=0)
            return counted
        self.rows_E = counted
        if experts > 1:
            self.rows_RE = self.num_global_tokens_per_local_expert
        else:  # Megatron drops the table of one expert
            splits = counted if sources == 1 else self.output_splits
            assert splits is not None
            self.rows_RE = splits.view(-1, 1)
        return counted

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stage 1; see MoEAlltoAllTokenDispatcher.

        Raises:
            ValueError: a mask whose rows are not the routed pairs.
        """
        bits_NB = self._start()
        if bits_NB is None:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        padded = self.config.moe_router_padding_for_quantization
        routed_TE = routing_map.clone() if padded else routing_map  # pad_routing_map writes to it
        permuted, permuted_probs = super().dispatch_preprocess(hidden_states, routing_map, probs)
        padded = padded or self.drop_and_pad
        # Without padding each permuted row is a routed pair: no need to wait for the device.
        check_rows(bits_NB, int(routed_TE.sum()) if padded else permuted.shape[0])
        if self.drop_and_pad:
            bits_NB = _pad_to_capacity(bits_NB, routed_TE, self.capacity)
        elif padded:
            bits_NB = _spread(bits_NB, routed_TE.T.masked_select(self.routing_map.T))
        self._bits_NB = bits_NB
        return permuted, permuted_probs

    def token_dispatch(
        self, permutated_local_input_tokens: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stage 2; see MoEAlltoAllTokenDispatcher."""
        if self._bits_NB is None:
            return super().token_dispatch(permutated_local_input_tokens, permuted_probs)
        # First, since it brings the splits to the CPU.
        dispatched = super().token_dispatch(permutated_local_input_tokens, permuted_probs)
        rows = self._bits_NB.shape[0]
        splits = self.input_splits
        kept_here = rows // self.ep_size if splits is None else int(splits[self.ep_rank])
        self._count(rows - kept_here)
        with torch.no_grad():
            self._bits_NB = all_to_all(
                self.ep_group,
                self._bits_NB,
                self.output_splits,
                splits,
                use_nccl_stream=self.use_nccl_stream,
            )
        return dispatched

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stage 3; see MoEAlltoAllTokenDispatcher."""
        if self._bits_NB is None:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        # First, since it brings the row counts of the sort to the CPU.
        processed = super().dispatch_postprocess(global_input_tokens, global_probs)
        bits_NB, self._bits_NB = self._bits_NB, None
        if self.tp_size > 1:
            splits = self.output_splits_tp
            rows_R = [bits_NB.shape[0]] * self.tp_size if splits is None else splits.tolist()
            bits_NB = self._gather(bits_NB, self.tp_group, rows_R)
        if self.num_local_experts > 1:
            # With a capacity every chunk is of that size, so one sort serves both of Megatron's
            # paths. Its fused kernel is for the tokens' types, not for bytes.
            bits_NB, _ = sort_chunks_by_idxs(
                bits_NB,
                self.num_global_tokens_per_local_expert.ravel(),
                self.sort_input_by_local_experts,
            )
        self._arrived_NB = bits_NB
        return processed

    def rows_on_device(self, tokens_per_expert: Tensor) -> Tensor:
        """See MaskCarrier."""
        return self.rows_E

    @torch.no_grad()
    def rows_by_source(self, tokens_per_expert: Tensor) -> Tensor:
        """See MaskCarrier; a collective of ETP where the rank has one expert and no capacity."""
        rows_RE = self.rows_RE
        if rows_RE.shape[0] < self.tp_size * self.ep_size:
            rows_RE = gather_from_sequence_parallel_region(rows_RE, group=self.tp_group)
        return rows_RE.t()

    @torch.no_grad()
    def return_mask(self, mask: NeuronMask, routing_map: Tensor) -> Tensor:
        """See MaskCarrier; undoes stages 3, 2 and 1."""
        bits_NB = self._pack_whole(mask)
        if self.num_local_experts > 1:
            bits_NB, _ = sort_chunks_by_idxs(
                bits_NB,
                self.num_global_tokens_per_local_expert.T.ravel(),
                self.restore_output_by_local_experts,
            )
        if self.tp_size > 1:
            # Each rank filled in its own neurons of the same rows: the sum joins them.
            torch.distributed.all_reduce(bits_NB, group=self.tp_group)
            splits = self.output_splits_tp
            rows = bits_NB.shape[0] // self.tp_size
            parts = [rows] * self.tp_size if splits is None else splits.tolist()
            bits_NB = bits_NB.split(parts)[self.tp_rank].contiguous()
        bits_NB = all_to_all(
            self.ep_group,
            bits_NB,
            self.input_splits,
            self.output_splits,
            use_nccl_stream=self.use_nccl_stream,
        )
        if self.drop_and_pad:
            fits_N, real_EC = _capacity_slots(routing_map, self.capacity)
            returned = bits_NB.new_zeros((fits_N.numel(), bits_NB.shape[1]))
            returned[fits_N] = bits_NB[real_EC.reshape(-1)]
            return returned
        if self.config.moe_router_padding_for_quantization:
            return bits_NB[routing_map.T.masked_select(self.routing_map.T)]
        return bits_NB


class MaskAllGatherTokenDispatcher(MaskCarrier, MoEAllGatherTokenDispatcher):
    """The allgather dispatcher with masks: all packed rows are gathered, as all tokens are.

    1. dispatch_preprocess: check the rows
    2. token_dispatch: gather over ETP x EP
    3. dispatch_postprocess: pick the rows of the local experts, in the order of `permute`
    """

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stage 1; see MoEAllGatherTokenDispatcher.

        Raises:
            ValueError: a mask whose rows are not the routed pairs.
        """
        bits_NB = self._start()
        if bits_NB is not None:
            check_rows(bits_NB, int(routing_map.sum()))
            self._bits_NB = bits_NB
        return super().dispatch_preprocess(hidden_states, routing_map, probs)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 2; see MoEAllGatherTokenDispatcher."""
        if self._bits_NB is None:
            return super().token_dispatch(hidden_states, probs)
        # First, since it gathers the routing map that tells each rank's rows.
        dispatched = super().token_dispatch(hidden_states, probs)
        if self.tp_size > 1 or self.ep_size > 1:
            rows_R = self._map_RTE().sum(dim=(1, 2)).tolist()
            self._bits_NB = self._gather(self._bits_NB, self.tp_ep_group, rows_R)
        return dispatched

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stage 3; see MoEAllGatherTokenDispatcher."""
        if self._bits_NB is None:
            return super().dispatch_postprocess(hidden_states, probs)
        bits_NB, self._bits_NB = self._bits_NB, None
        map_RET = self._map_RTE().transpose(1, 2).contiguous()  # super() drops routing_map
        processed = super().dispatch_postprocess(hidden_states, probs)
        self._arrived_NB = bits_NB[self._local_rows(map_RET)]
        return processed

    def rows_on_device(self, tokens_per_expert: Tensor) -> Tensor:
        """See MaskCarrier."""
        return self.local_map.sum(dim=0)

    def rows_by_source(self, tokens_per_expert: Tensor) -> Tensor:
        """See MaskCarrier."""
        sources, experts = self.tp_size * self.ep_size, self.num_local_experts
        return self.local_map.view(sources, -1, experts).sum(dim=1).t()

    @torch.no_grad()
    def return_mask(self, mask: NeuronMask, routing_map: Tensor) -> Tensor:
        """See MaskCarrier; a sum over ETP x EP of the rows that each rank fills in."""
        bits_NB = self._pack_whole(mask)
        if self.tp_size == 1 and self.ep_size == 1:
            return bits_NB  # one source: its rows stand expert-major already
        gathered = gather_from_sequence_parallel_region(routing_map, group=self.tp_ep_group)
        map_RTE = gathered.bool().view(self.tp_size * self.ep_size, *routing_map.shape)
        map_RET = map_RTE.transpose(1, 2).contiguous()
        whole = bits_NB.new_zeros((int(map_RET.sum()), bits_NB.shape[1]))
        whole[self._local_rows(map_RET)] = bits_NB
        torch.distributed.all_reduce(whole, group=self.tp_ep_group)
        rows_R = map_RET.sum(dim=(1, 2)).tolist()
        return whole.split(rows_R)[self.tp_ep_group.rank()].contiguous()

    def _map_RTE(self) -> Tensor:
        """The gathered routing map by source rank; every source has the same T."""
        sources = self.tp_size * self.ep_size
        return self.routing_map.bool().view(sources, -1, self.routing_map.shape[1])

    def _local_rows(self, map_RET: Tensor) -> Tensor:
        """[N] where the rows of the local experts stand among the gathered ones, in row order."""
        # Gathered rows stand source by source, each expert-major: a running count is their index.
        row_RET = (map_RET.reshape(-1).cumsum(0) - 1).view(map_RET.shape)
        first, last = self.local_expert_indices[0], self.local_expert_indices[-1] + 1
        local_ERT = map_RET[:, first:last].transpose(0, 1)
        return row_RET[:, first:last].transpose(0, 1)[local_ERT]


def _spread(bits_NB: Tensor, real_M: Tensor) -> Tensor:
    """[M, B] with the rows of `bits_NB` where `real_M`, in order, and empty rows elsewhere."""
    spread_MB = bits_NB.new_zeros((real_M.numel(), bits_NB.shape[1]))
    spread_MB[real_M] = bits_NB
    return spread_MB


def _pad_to_capacity(bits_NB: Tensor, routing_map: Tensor, capacity: int) -> Tensor:
    """[E * C, B]: the first C rows of each expert, then empty ones, as `permute` drops and pads."""
    fits_N, real_EC = _capacity_slots(routing_map, capacity)
    return _spread(bits_NB[fits_N], real_EC.reshape(-1))


def _capacity_slots(routing_map: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """([N] routed pairs that fit, [E, C] slots that hold one), both expert-major."""
    map_ET = routing_map.bool().T
    fits_N = (map_ET.cumsum(dim=1) <= capacity).masked_select(map_ET)
    slots_C = torch.arange(capacity, device=routing_map.device)
    return fits_N, slots_C < map_ET.sum(dim=1, keepdim=True)
