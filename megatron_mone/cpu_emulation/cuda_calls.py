"""The calls of `torch.cuda` that a training step makes: device, stream, event, properties.

A CPU rank has one queue, in which everything is finished when the call returns. So there is one
stream, equal to every other, an event is a time stamp, and synchronising is nothing to do.
`torch.cuda.is_available()` and `device_count()` keep telling the truth.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from megatron_mone.common.patch import Patch, megatron_source, raises
from megatron_mone.cpu_emulation.device import CPU

CAPABILITY = (8, 0)
"""Reported compute capability: the least that `--moe-grouped-gemm` accepts (arguments.py)."""


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a call that only waits for, orders or tunes device work."""


class Event:
    """Stand in for `torch.cuda.Event`: remembers when it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        """Note the time; all work issued before has already run."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`. Raises RuntimeError if one is unrecorded."""
        if self._seconds is None or end_event._seconds is None:
            raise RuntimeError("both events must be recorded before elapsed_time")
        return 1000.0 * (end_event._seconds - self._seconds)

    def query(self) -> bool:
        """Everything is done: True."""
        return True

    wait = synchronize = _nothing


class Stream:
    """Stand in for `torch.cuda.Stream`: the one queue of a CPU rank."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority, as CUDA names them."""
        return (0, -1)

    def record_event(self, event: Event | None = None) -> Event:
        """Record and return `event`, or a new one."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Everything is done: True."""
        return True

    wait_event = wait_stream = synchronize = _nothing


_STREAM = Stream()


def _properties(device: Any = None) -> SimpleNamespace:
    """Stand in for `torch.cuda.get_device_properties`; sizes in bytes."""
    return SimpleNamespace(
        name="cpu (emulated device)",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=psutil.cpu_count() or 1,
        warp_size=32,
    )


def _stream_context(stream: Any = None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


CALLS: dict[str, Any] = {
    # A device, not an index: Megatron hands it to `device=` everywhere, and one is harmless there.
    "current_device": lambda: CPU,
    "set_device": _nothing,
    "synchronize": _nothing,
    "init": _nothing,
    "_lazy_init": _nothing,
    "ipc_collect": _nothing,
    "Stream": Stream,
    "Event": Event,
    "stream": _stream_context,
    "set_stream": _nothing,
    "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM,
    "is_current_stream_capturing": lambda: False,
    "get_device_properties": _properties,
    "get_device_capability": lambda device=None: CAPABILITY,
    "get_device_name": lambda device=None: _properties().name,
    "is_bf16_supported": lambda including_emulation=True: True,
}
"""Attributes of `torch.cuda` and what stands in for them."""


def put(calls: Mapping[str, Any], *modules: Any) -> None:
    """Set the stand-ins, by name, in each of the modules."""
    for module in modules:
        for name, stand_in in calls.items():
            setattr(module, name, stand_in)


PATCHES = (
    Patch(
        name="cuda-calls",
        needed_by="megatron/core/timers.py: torch.cuda.synchronize()",
        why="device, stream, event and property calls raise without a driver",
        apply=lambda: put(CALLS, torch.cuda),
        still_needed=lambda: (
            raises(lambda: torch.cuda.current_device())
            and raises(lambda: torch.cuda.synchronize())
            and "torch.cuda.synchronize()" in megatron_source("core/timers.py")
        ),
    ),
)
