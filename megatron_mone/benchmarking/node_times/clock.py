"""Seconds of a call, as a rank of a job sees it: all ranks make it at once.

On a GPU by gpu_answer's replays of a graph, without the host. On CPU ranks a window of calls over
their number, and the least of several windows: what else the machine does meanwhile is not ours.
Ranks that share a core take turns within a window.
Not run on a GPU.
"""

import time
from collections.abc import Callable, Sequence

import torch

from megatron_mone.benchmarking.gpu_answer.clock import replay_ms, wall_ms

Call = Callable[[], object]
WINDOWS = 5


def seconds(calls: Sequence[Call], device: torch.device, spend: float) -> float:
    """Of one call.

    Args:
        calls: the same work on different memory, taken in turn, so that not all of it is in the
            caches.
        device: whose time it is.
        spend: seconds of all windows on a CPU rank, where a call is not longer.
    """
    if device.type == "cuda":
        try:
            return replay_ms(calls[0], device, WINDOWS) / 1e3
        except RuntimeError:  # it waits for the device, or a graph cannot hold it
            return wall_ms(calls[0], device, WINDOWS) / 1e3
    return windows(calls, spend)


def windows(calls: Sequence[Call], spend: float, agree: Callable[[int], int] = int) -> float:
    """The least over WINDOWS of seconds a call, by the wall clock.

    Args:
        calls, spend: as of `seconds`.
        agree: told how many calls a window should have, it says how many it has.
    """
    calls[0]()
    start = time.perf_counter()
    for call in calls:
        call()
    once = (time.perf_counter() - start) / len(calls)
    often = agree(max(1, round(spend / WINDOWS / max(once, 1e-7))))
    taken = []
    at = 0
    for _ in range(WINDOWS):
        start = time.perf_counter()
        for _ in range(often):
            calls[at % len(calls)]()
            at += 1
        taken.append((time.perf_counter() - start) / often)
    return min(taken)
