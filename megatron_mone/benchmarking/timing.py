"""Interleaved timing: every implementation runs once a round, in an order drawn for each round."""

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]
Stays = Callable[[list[dict[str, list[float]]]], list[bool]]
MOST_ROUNDS = 200


@dataclass(frozen=True)
class Times:
    """Milliseconds of one implementation in one phase.

    Attributes:
        median: of all rounds.
        p10, p90: the tenth and the ninetieth percentile.
        repeats: rounds, the warm-up left out.
    """

    median: float
    p10: float
    p90: float
    repeats: int


def race(
    entries: Sequence[dict[str, Call]],
    *,
    seconds: float,
    least: int,
    warm_up: int = 1,
    stays: Stays | None = None,
) -> list[dict[str, Times]]:
    """Time all phases of all entries; arguments as of `rounds`.

    Returns:
        phase -> times, one dictionary an entry, in their order.
    """
    taken = rounds(entries, seconds=seconds, least=least, warm_up=warm_up, stays=stays)
    return [{phase: summary(values) for phase, values in entry.items()} for entry in taken]


def rounds(
    entries: Sequence[dict[str, Call]],
    *,
    seconds: float,
    least: int,
    warm_up: int = 1,
    stays: Stays | None = None,
) -> list[dict[str, list[float]]]:
    """Time all phases of all entries.

    Args:
        entries: phase -> call, one dictionary an implementation.
        seconds: goes on until this much time is spent, warm-up included.
        least: but for at least so many rounds.
        warm_up: rounds that are not counted.
        stays: asked after `least` rounds, with what this returns, who runs in the further ones:
            as many again and as much time again, at least, for these are near each other.

    Returns:
        phase -> milliseconds of each round, one dictionary an entry, in their order.
    """
    running, order = list(range(len(entries))), random.Random(0)
    taken: list[dict[str, list[float]]] = [{phase: [] for phase in entry} for entry in entries]
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(warm_up + max(least, MOST_ROUNDS)):
            if done == warm_up + least and stays is not None:
                running = [i for i, kept in enumerate(stays(taken)) if kept]
                start, least, stays = time.perf_counter(), 2 * least, None
            if done >= warm_up + least and time.perf_counter() - start > seconds:
                break
            for i in order.sample(running, len(running)):
                for phase, call in entries[i].items():
                    elapsed = seconds_of(call)
                    if done >= warm_up:
                        taken[i][phase].append(1e3 * elapsed)
    finally:
        if collecting:
            gc.enable()
    return taken


def summary(values: Sequence[float]) -> Times:
    """Median and percentiles, linear between the values."""
    median, p10, p90 = np.quantile(values, (0.5, 0.1, 0.9)).tolist()
    return Times(median, p10, p90, len(values))


def seconds_of(call: Call) -> float:
    """Seconds of one call; on CUDA until the device is done."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
