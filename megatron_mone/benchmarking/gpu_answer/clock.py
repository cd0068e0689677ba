"""Times of device work. On a GPU by CUDA events around replays of a graph, without what the host
takes to launch; in the interpreter by the wall clock, which says nothing of a GPU.

Not run on a GPU yet.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

Call = Callable[[], object]
WARM_UP = 3
SPEND = 0.2  # seconds of one time's repeats
SHORT, MANY = 0.2, 20  # milliseconds of a call that a graph holds so often: events cost a few us


def captured(call: Call, times: int = 1) -> torch.cuda.CUDAGraph:
    """A call, or so many after each other, as a graph; it runs before, which compiles.

    Raises:
        RuntimeError: the call waits for the device, or does what no graph can hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph


def replay_ms(call: Call, device: torch.device, repeats: int) -> float:
    """Milliseconds of a call on the device alone; without a GPU the wall clock's of one call."""
    if device.type != "cuda":
        return wall_ms(call, device, repeats)
    ms = wall_ms(captured(call).replay, device, repeats)
    if ms >= SHORT:
        return ms
    return wall_ms(captured(call, MANY).replay, device, repeats) / MANY


def wall_ms(call: Call, device: torch.device, repeats: int) -> float:
    """Median milliseconds of a call as Python runs it, from events where there is a GPU."""
    if device.type != "cuda":
        return median(_seconds(call) for _ in range(repeats)) * 1e3
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    taken: list[float] = []
    start = time.monotonic()
    while len(taken) < repeats or (len(taken) < 200 and time.monotonic() - start < SPEND):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return median(taken)


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
