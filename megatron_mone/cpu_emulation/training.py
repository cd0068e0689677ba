"""Megatron's start-up: the CUDA assertion, the device count, the launch-order variable."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from megatron_mone.common.patch import Patch, Replaced, in_source, megatron_source, rebind, wrapping


def one_device() -> AbstractContextManager[None]:
    """Let `torch.cuda.device_count()` be 1 inside; Megatron sets up its groups only then."""
    return Replaced(torch.cuda, "device_count", lambda: 1)


def _with_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with one_device():
            return function(*args, **kwargs)

    return wrapped


def _apply_assertion() -> None:
    from megatron.training import initialize

    original = initialize.initialize_megatron

    @functools.wraps(original)
    def initialize_megatron(allow_no_cuda: bool = True, *args: Any, **kwargs: Any) -> Any:
        return original(True, *args, **kwargs)

    initialize.initialize_megatron = initialize_megatron
    rebind(original, initialize_megatron)


def _apply_launch_order() -> None:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


PATCHES = (
    Patch(
        name="launch-order",
        needed_by="megatron/training/arguments.py: CUDA_DEVICE_MAX_CONNECTIONS",
        why="tensor parallelism on a device before Blackwell asserts this variable is 1; a CPU "
        "rank has one queue, so it is always true",
        apply=_apply_launch_order,
        still_needed=in_source("training/arguments.py", "CUDA_DEVICE_MAX_CONNECTIONS"),
    ),
    Patch(
        name="cuda-assertion",
        needed_by="megatron/training/initialize.py: assert torch.cuda.is_available()",
        why="initialize_megatron refuses machines without CUDA unless told that it may",
        apply=_apply_assertion,
        still_needed=in_source(
            "training/initialize.py", 'assert torch.cuda.is_available(), "Megatron requires CUDA."'
        ),
    ),
    wrapping(
        "device-count",
        "megatron.training.initialize: _initialize_distributed, _set_random_seed",
        _with_one_device,
        why="with no device, model-parallel groups are not made and the RNG tracker is not seeded",
        needed_while=lambda: (
            torch.cuda.device_count() == 0
            and "if device_count > 0 and not skip_model_parallel_init"
            in megatron_source("training/initialize.py")
        ),
    ),
)
