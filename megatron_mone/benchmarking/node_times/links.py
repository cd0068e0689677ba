"""Collectives as calls, over groups of ranks that sit as the groups of the layout do.

A group of n ranks, `stride` apart, stands beside its like until the ranks here are used up, and all
of them call at once, as they do in a step. Not run over NCCL.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_mone.benchmarking.node_times.clock import windows
from megatron_mone.planning.fitting.node_times import Link

Call = Callable[[], object]


class Links:
    """Groups of this process, made when they are first asked for; all ranks ask in one order.

    Args:
        device: of the tensors.
        spend: seconds of a collective, as of `clock.seconds`.
    """

    def __init__(self, device: torch.device, spend: float) -> None:
        self._device, self._spend = device, spend
        self._groups: dict[tuple[int, int], dist.ProcessGroup | None] = {}

    def why_not(self, link: Link) -> str | None:
        """Why a collective cannot be timed on the ranks here; None where it can."""
        ranks, here = _span(link), dist.get_world_size()
        if ranks > here:
            return f"{link.kind} of {link.ranks} ranks, {link.stride} apart, needs {ranks} ranks"
        return None

    def time(self, link: Link) -> float | None:
        """Seconds of one call on this rank; None where it is in no group."""
        group = self._group(link)
        if group is None:
            return None
        calls = [_call(link, group, self._device)]
        if self._device.type != "cuda":
            return _agreed(calls, self._spend, group)
        for call in calls:
            call()

        def synchronised() -> None:
            calls[0]()
            torch.cuda.synchronize()

        return _agreed([synchronised], self._spend, group)

    def _group(self, link: Link) -> dist.ProcessGroup | None:
        key = (2 if link.kind == "send" else link.ranks, link.stride)
        if key not in self._groups:
            mine = None
            for ranks in groups_of(*key, dist.get_world_size()):
                made = dist.new_group(list(ranks))
                if dist.get_rank() in ranks:
                    mine = made
            self._groups[key] = mine
        return self._groups[key]


def groups_of(ranks: int, stride: int, world: int) -> list[range]:
    """Groups of `ranks` ranks, `stride` apart, side by side in a world; the rest is in none."""
    block = ranks * stride
    return [
        range(first + offset, first + block, stride)
        for first in range(0, world - block + 1, block)
        for offset in range(stride)
    ]


def _span(link: Link) -> int:
    return (2 if link.kind == "send" else link.ranks) * link.stride


def _agreed(calls: Sequence[Call], spend: float, group: dist.ProcessGroup) -> float:
    """Windows of a collective: all ranks of its group make as many calls."""
    dist.barrier(group=group)
    return windows(calls, spend, lambda often: _first(often, group))


def _first(often: int, group: dist.ProcessGroup) -> int:
    """What the first rank of a group says."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    said = torch.tensor([often], device=device)
    dist.broadcast(said, dist.get_process_group_ranks(group)[0], group=group)
    return int(said.item())


def _call(link: Link, group: dist.ProcessGroup, device: torch.device) -> Call:
    """One call of this rank, with the bytes that it puts in."""
    n = link.ranks
    entries = max(1, link.bytes // 4)
    if link.kind in ("reduce_scatter", "all_to_all"):
        entries = -(-entries // n) * n
    x = torch.ones(entries, device=device)
    members = dist.get_process_group_ranks(group)
    if link.kind == "all_reduce":
        return lambda: dist.all_reduce(x, group=group)
    if link.kind == "all_gather":
        out = torch.empty(n * entries, device=device)
        return lambda: dist.all_gather_into_tensor(out, x, group=group)
    if link.kind == "reduce_scatter":
        part = torch.empty(entries // n, device=device)
        return lambda: dist.reduce_scatter_tensor(part, x, group=group)
    if link.kind == "all_to_all":
        out = torch.empty_like(x)
        return lambda: dist.all_to_all_single(out, x, group=group)
    if link.kind == "broadcast":
        return lambda: dist.broadcast(x, members[0], group=group)
    if link.kind == "reduce":
        return lambda: dist.reduce(x, members[0], group=group)
    return _exchange(x, members, group)


def _exchange(x: torch.Tensor, members: Sequence[int], group: dist.ProcessGroup) -> Call:
    """A send in each direction at once, as stages of a pipeline exchange them."""
    here = dist.get_rank()
    peer = members[1] if here == members[0] else members[0]
    received = torch.empty_like(x)

    def both() -> None:
        works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, x, peer, group), dist.P2POp(dist.irecv, received, peer, group),
        ])  # fmt: skip
        for work in works:
            work.wait()

    return both
