"""What Megatron's token dispatchers know about where a routed row came from.

After dispatch an expert's rows come from every rank of its expert group at once. The balance loss
needs them by source micro-batch (docs/MODEL.md, "Scope"), so the layer asks for the number of rows
per local expert and source rank, in the order in which the dispatcher lays them out.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SourceMap:
    """Which micro-batch each rank of the expert group feeds; fixed when the layer is built.

    Attributes:
        microbatch_of_source: for each source in the dispatcher's row order, the index 0..M-1 of
            the data-parallel micro-batch it holds a shard of.
        num_microbatches: M, over all data-parallel ranks when shards of one micro-batch reach
            different replicas of an expert, else over the sources of this expert group alone.
        replica_group: ranks whose statistics must be summed to see a whole micro-batch (the
            expert-data-parallel group); None when the expert group sees whole micro-batches.
        microbatch_of_rank: the same as microbatch_of_source, in the order of the group's ranks.
    """

    microbatch_of_source: tuple[int, ...]
    num_microbatches: int
    replica_group: ProcessGroup | None
    microbatch_of_rank: tuple[int, ...]

    @cached_property
    def microbatch_of_source_R(self) -> Tensor:
        """[R] int64."""
        return torch.tensor(self.microbatch_of_source)


class Shard(NamedTuple):
    """What a rank tells its expert group of the micro-batch that it holds a part of.

    Attributes:
        name: of the micro-batch: the lowest global rank of its (dense) TP x CP group.
        whole: whether the expert group holds all of that group.
    """

    name: int
    whole: bool


class Known(frozenset[int]):
    """What a rank tells the replicas of its experts: the micro-batches of its expert group."""


def build_source_map(
    *,
    tp_cp_group: ProcessGroup,
    tp_ep_group: ProcessGroup,
    expt_tp_group: ProcessGroup,
    expt_dp_group: ProcessGroup,
    etp_major: bool,
) -> SourceMap:
    """Exchange, once, which micro-batch each rank of the expert group holds a shard of.

    Args:
        tp_cp_group: ranks that hold the shards of this rank's micro-batch.
        tp_ep_group: ranks that send rows to the same experts (ETP x EP, ETP fastest).
        expt_tp_group: ranks that hold the neurons of the same experts.
        expt_dp_group: replicas of this rank's experts.
        etp_major: row order of the dispatcher: [ETP, EP] (alltoall) or group ranks (allgather,
            flex).
    """
    shard_ranks = torch.distributed.get_process_group_ranks(tp_cp_group)
    expert_ranks = torch.distributed.get_process_group_ranks(tp_ep_group)
    own = Shard(min(shard_ranks), set(shard_ranks) <= set(expert_ranks))
    shards: list = [None] * len(expert_ranks)
    torch.distributed.all_gather_object(shards, own, group=tp_ep_group)
    crosses = not all(shard.whole for shard in shards)
    known = Known(shard.name for shard in shards)
    if crosses:
        everyone: list = [None] * expt_dp_group.size()
        torch.distributed.all_gather_object(everyone, known, group=expt_dp_group)
        known = Known(name for names in everyone for name in names)
    index = {n: i for i, n in enumerate(sorted(known))}
    order = by_rank = [index[shard.name] for shard in shards]
    if etp_major:
        parts = expt_tp_group.size()
        order = [order[e * parts + t] for t in range(parts) for e in range(len(order) // parts)]
    replicas = expt_dp_group if crosses else None
    return SourceMap(tuple(order), len(index), replicas, tuple(by_rank))


def rows_by_source(dispatcher: MoETokenDispatcher, tokens_per_expert: Tensor) -> Tensor:
    """Rows per local expert and source rank, to be called after `dispatch_postprocess`.

    Args:
        dispatcher: a stock dispatcher that has just dispatched. For flex this is a collective of
            ETP x EP.
        tokens_per_expert: [E_l] rows per local expert.

    Returns:
        [E_l, R] int64 on the CPU: row blocks in the order they stand in the dispatched tensor,
        expert-major, sources in the order of SourceMap.

    Raises:
        ValueError: a dispatcher or a padding whose row layout is not known here.
    """
    experts = tokens_per_expert.numel()
    if isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
        sources = dispatcher.tp_size * dispatcher.ep_size
        if sources == 1:
            return tokens_per_expert.view(experts, 1).long().cpu()
        if dispatcher.drop_and_pad:
            assert dispatcher.capacity is not None
            return torch.full((experts, sources), dispatcher.capacity, dtype=torch.long)
        if experts == 1:
            # preprocess() keeps the [tp, ep] table only for several local experts
            return _single_expert_rows(dispatcher).view(1, sources)
        return dispatcher.num_global_tokens_per_local_expert.view(sources, experts).t().cpu()
    if isinstance(dispatcher, MoEAllGatherTokenDispatcher):
        sources = dispatcher.tp_size * dispatcher.ep_size
        return dispatcher.local_map.view(sources, -1, experts).sum(dim=1).t().cpu()
    if isinstance(dispatcher, MoEFlexTokenDispatcher):
        return _flex_rows(dispatcher, tokens_per_expert)
    raise ValueError(
        f"moe_token_dispatcher_type: the row layout of {type(dispatcher).__name__} is not known; "
        "use alltoall, allgather or flex with a neuron-granular balance loss of scope micro_batch"
    )


def _single_expert_rows(dispatcher: MoEAlltoAllTokenDispatcher) -> Tensor:
    """[tp * ep] rows for the only local expert, ETP-major, exchanged over the ETP ranks."""
    mine_R = torch.as_tensor(dispatcher.output_splits, dtype=torch.long).reshape(-1)
    if dispatcher.tp_size == 1:
        return mine_R
    mine_R = mine_R.to(dispatcher.routing_map.device)
    parts = [torch.empty_like(mine_R) for _ in range(dispatcher.tp_size)]
    torch.distributed.all_gather(parts, mine_R, group=dispatcher.tp_group)
    return torch.cat(parts).cpu()


def _flex_rows(dispatcher: MoEFlexTokenDispatcher, tokens_per_expert: Tensor) -> Tensor:
    """[E_l, R] from the row counts of every rank, which the libraries keep to themselves.

    Both lay an expert's rows by source rank of the ETP x EP group, then by token: DeepEP by the
    prefix sums of its handle, HybridEP by a scan of the gathered routing map.
    """
    manager: Any = dispatcher._comm_manager
    backend = dispatcher.config.moe_flex_dispatcher_backend
    experts, ranks = tokens_per_expert.numel(), manager.group.size()
    if backend == "deepep":
        index_TK = manager.token_indices
        sent_X = torch.bincount(index_TK[index_TK >= 0], minlength=ranks * experts)
    elif backend == "hybridep":
        sent_X = manager.routing_map.sum(dim=0)
    else:
        raise ValueError(
            f"moe_flex_dispatcher_backend = {backend!r}: its row layout is not known; use deepep "
            "or hybridep with a neuron-granular balance loss of scope micro_batch"
        )
    parts = [torch.empty_like(sent_X) for _ in range(ranks)]
    torch.distributed.all_gather(parts, sent_X, group=manager.group)
    sent_RRE = torch.stack(parts).view(ranks, ranks, experts)
    rows_ER = sent_RRE[:, manager.group.rank()].t().cpu()
    if not torch.equal(rows_ER.sum(dim=1), tokens_per_expert.cpu().long()):
        raise ValueError(
            f"moe_flex_dispatcher_backend = {backend!r}: the experts got "
            f"{tokens_per_expert.tolist()} rows for {rows_ER.sum(dim=1).tolist()} routed ones; "
            "with rows padded or dropped there, use alltoall with a neuron-granular balance loss"
        )
    return rows_ER
