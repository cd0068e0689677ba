"""What Megatron's token dispatchers know about where a routed row came from.

After dispatch an expert's rows come from every rank of its expert group at once. The balance loss
needs them by source micro-batch (docs/MODEL.md, "Scope"), so the layer asks its dispatcher for the
number of rows per local expert and source rank, in the order in which it lays them out
(`MaskCarrier.rows_by_source`). Counts stay on the tokens' device, and nothing here waits for it.

Shapes: N routed rows, E_l experts of this rank, R source ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
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

    def block_of_cell(self, experts: int, *, parted: bool) -> list[int]:
        """Block of each cell e * R + r of `experts` local experts: e * M + m, or e where micro-
        batches are not `parted`; then the number of blocks, for rows of no cell."""
        order = self.microbatch_of_source if parted else (0,) * len(self.microbatch_of_source)
        count = self.num_microbatches if parted else 1
        return [e * count + m for e in range(experts) for m in order] + [experts * count]


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


def cell_of_row(rows_ER: Tensor, rows: int) -> Tensor:
    """[N] int64: the cell e * R + r that a row stands in, by its place alone.

    Args:
        rows_ER: [E_l, R] int64 rows per local expert and source, in row order.
        rows: N; rows beyond the counted ones stand in cell E_l * R.
    """
    ends = rows_ER.flatten().cumsum(0)
    return torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True)
