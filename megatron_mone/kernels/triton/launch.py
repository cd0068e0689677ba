"""Launches of kernels: one place that starts them, or has them taken down instead.

`launch` names a kernel of device/, what it reads and writes, and its operations. Under `recording`
nothing runs: a recorder gets the launch and its outputs stay unwritten, which is how launches are
counted on tensors without values and how the planner knows what a layer would run. On tensors of
torch's meta device nothing runs either.
Importing this needs no triton.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mone.kernels.triton.availability import available

INTERPRETED_PROGRAMS = 3  # few, so that a persistent kernel's loop is gone through
RECORDED_PROGRAMS = 132  # multiprocessors of an H100


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kernel: its name in device/, "module.function" without "_kernel".
        reads, writes: its tensors; one that it adds to is in both.
        flops: multiplications and additions of its tensor-core products.
    """

    kernel: str
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    flops: int


_recorders: list[Callable[[Launch], None]] = []


@contextmanager
def recording(take: Callable[[Launch], None]) -> Iterator[None]:
    """While it lasts, launches go to `take` and nothing runs; the innermost one gets them."""
    _recorders.append(take)
    try:
        yield
    finally:
        _recorders.remove(take)


def is_recording() -> bool:
    """Whether launches are taken down instead of run."""
    return bool(_recorders)


def launch(
    kernel: str,
    grid: Sequence[int],
    arguments: Sequence[Any],
    *,
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
    flops: int = 0,
    **constants: Any,
) -> None:
    """Start one kernel on the tensors' device, or hand it to a recorder.

    Args:
        kernel: "module.function" of device/, without "_kernel".
        grid: one to three numbers of programs.
        arguments: in the kernel's order, without its constants.
        reads, writes, flops: see Launch.
        constants: the kernel's constants and Triton's launch options.

    Raises:
        RuntimeError: the kernels cannot run here; the text is `available`'s reason.
    """
    if _recorders:
        _recorders[-1](Launch(kernel, tuple(reads), tuple(writes), flops))
    elif not writes[0].is_meta:
        if "UPCAST" in constants:  # of products; only the interpreter runs on the CPU
            constants["UPCAST"] = writes[0].device.type == "cpu"
        _function(kernel)[tuple(grid)](*arguments, **constants)


def programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one for each multiprocessor."""
    if _recorders or device.type == "meta":
        return RECORDED_PROGRAMS
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _function(kernel: str) -> Any:
    usable, reason = available()
    if not usable:
        raise RuntimeError(f"the triton backend is not usable: {reason}")
    import triton

    # Descriptors made in a kernel stand in memory that the launcher asks for.
    triton.set_allocator(_descriptor_space)
    module, function = kernel.split(".")
    imported = importlib.import_module(f"megatron_mone.kernels.triton.device.{module}")
    return getattr(imported, f"{function}_kernel")


def _descriptor_space(size: int, _alignment: int, _stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
