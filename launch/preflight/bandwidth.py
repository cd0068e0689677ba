"""All-reduce within a node and between pairs of nodes. Imports torch: only ranks that measure do.

Each group is measured in a forked child with a deadline, so that a collective that hangs or kills
its process is one failed group. May touch: child processes, ports of `meeting_port`, GPU memory.
"""

import contextlib
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from launch.preflight.bounded import CallFailed, bounded
from launch.preflight.limits import Limits
from launch.preflight.pairs import pair_rounds
from launch.preflight.place import Place, meeting_port

REPEATS = 5
MEGABYTES = {"nccl": 256.0, "gloo": 64.0}
_LEAVE_SECONDS = 5.0
_BIND_PAUSE = 0.5


@dataclass(frozen=True)
class Group:
    """Ranks that reduce together; rank 0 keeps the store at `address`:`port`."""

    label: str
    rank: int
    size: int
    address: str
    port: int


def stage_groups(place: Place, hosts: tuple[str, ...], node: int, backend: str) -> list[Any]:
    """What a rank does stage by stage: `(partner node or None, Group)`, or None for a free stage.

    All nodes have the same stages. With nccl all ranks of a node take part and the first stage is
    the node alone; with gloo one process a node does.

    Args:
        place: this rank's.
        hosts: names of all nodes.
        node: number of this node.
        backend: nccl or gloo.
    """
    ranks = place.ranks_per_node if backend == "nccl" else 1
    stages: list[Any] = []
    if ranks > 1:
        port = meeting_port(place.master_port, node, 0)
        stages.append((None, Group(f"node {node}", place.local_rank, ranks, "127.0.0.1", port)))
    for pairs in pair_rounds(len(hosts)):
        stage = None
        for pair in (pair for pair in pairs if node in pair):
            lower, upper = pair
            port = meeting_port(place.master_port, lower, upper - lower)
            rank = place.local_rank + ranks * (node == upper)
            group = Group(f"nodes {lower} and {upper}", rank, 2 * ranks, hosts[lower], port)
            stage = (lower + upper - node, group)
        stages.append(stage)
    return stages


def measure(
    place: Place, hosts: tuple[str, ...], node: int, limits: Limits, backend: str, start: float
) -> dict[str, Any]:
    """Measure the groups of this rank.

    A stage ends everywhere by a time counted from the start of the check, so that who waited in
    vain in one stage is not late for the next: its partner there waits for longer.

    Args:
        place: this rank's.
        hosts: names of all nodes.
        node: number of this node.
        limits: `seconds`, `megabytes`.
        backend: nccl or gloo.
        start: time.monotonic() at the start of the check.

    Returns:
        JSON: `versions`; `faults` of this rank; `node`, the bus bandwidth within the node in GB/s,
        or why there is none; `pairs`, the same for each partner's number.
    """
    found: dict[str, Any] = {"faults": [], "versions": _versions(backend), "pairs": {}}
    try:
        bounded(lambda: str(_device(place, backend)), limits.seconds)
    except CallFailed as error:  # this rank's own fault; its groups will miss it
        return found | {"faults": [str(error)]}
    megabytes = limits.megabytes or MEGABYTES[backend]
    for number, stage in enumerate(stage_groups(place, hosts, node, backend)):
        if stage is None:
            continue
        partner, group = stage
        seconds = last_moment(start, limits, number) - time.monotonic()
        try:
            value: Any = bounded(
                partial(all_reduce_gb_per_s, group, place, backend, megabytes, seconds), seconds
            )
        except CallFailed as error:
            value = str(error)
        if partner is None:
            found["node"] = value
        else:
            found["pairs"][str(partner)] = value
    return found


def last_moment(start: float, limits: Limits, stage: int) -> float:
    """When a stage ends at the latest, on the clock of `start`."""
    return start + limits.seconds * (1 + stage / 2)


def all_reduce_gb_per_s(
    group: Group, place: Place, backend: str, megabytes: float, seconds: float
) -> float:
    """Bus bandwidth of the group's fastest all-reduce of several, in 10^9 bytes a second.

    2 (n - 1) / n x bytes / seconds for n ranks: what each link carries, whatever n is
    (NVIDIA nccl-tests, doc/PERFORMANCE.md).

    Args:
        group: to meet.
        place: this rank's; says which GPU.
        backend: nccl or gloo.
        megabytes: of the message, 10^6 bytes.
        seconds: for the others to come, and for each collective.

    Raises:
        RuntimeError: a rank did not come or left, or the sum is wrong.
    """
    device = _device(place, backend)
    store = _store(group, seconds)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(group.label, store),
        rank=group.rank,
        world_size=group.size,
        timeout=timeout,
    )
    data = torch.empty(max(1, int(megabytes * 1e6) // 4), device=device)
    fastest = float("inf")
    for repeat in range(1 + REPEATS):
        data.fill_(1)
        dist.barrier()
        _wait_for(device)
        begin = time.perf_counter()
        dist.all_reduce(data)
        _wait_for(device)
        if repeat:  # the first one opens connections
            fastest = min(fastest, time.perf_counter() - begin)
    if not bool((data == group.size).all()):
        raise RuntimeError("the all-reduce gave a wrong sum")
    _leave(group, store)
    return 2 * (group.size - 1) / group.size * data.numel() * 4 / fastest / 1e9


def _device(place: Place, backend: str) -> torch.device:
    if backend == "gloo":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _store(group: Group, seconds: float) -> dist.TCPStore:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return dist.TCPStore(
                group.address,
                group.port,
                is_master=group.rank == 0,
                timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
                wait_for_workers=False,
            )
        except dist.DistNetworkError as error:
            # Another job's check may have the port for a moment.
            if "EADDRINUSE" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_BIND_PAUSE)


def _leave(group: Group, store: dist.TCPStore) -> None:
    """Rank 0 goes last: the store ends with its process."""
    names = [f"left {rank}" for rank in range(1, group.size)]
    if group.rank:
        store.set(names[group.rank - 1], "")
        return
    with contextlib.suppress(dist.DistError):  # this rank has measured all the same
        store.wait(names, timedelta(seconds=_LEAVE_SECONDS))


def _versions(backend: str) -> dict[str, str]:
    if backend == "gloo":
        return {}
    nccl = torch.cuda.nccl.version()
    return {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, nccl))}
