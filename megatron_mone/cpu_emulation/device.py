"""`device="cuda"` and the tensor methods that name CUDA, sent to the CPU.

Factory functions are wrapped instead of running everything under a `TorchFunctionMode`. A mode
costs every torch call of the program 2 to 5 microseconds; the wrappers cost the calls that can name
a device 0.3 to 0.9 and the others nothing (torch 2.14.1, one thread of a shared 2-core machine;
`python -m tests.unit.cpu_emulation.measure_overhead` prints the figures again).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_mone.common.patch import Patch, megatron_source, raises, rebind

CPU = torch.device("cpu")

FACTORIES = (
    "arange", "as_tensor", "asarray", "empty", "empty_like", "empty_permuted", "empty_strided",
    "eye", "full", "full_like", "linspace", "logspace", "ones", "ones_like", "rand", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "randperm", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros", "zeros_like",
)  # fmt: skip
"""Functions of `torch` that take `device=`."""

TENSOR_METHODS = (
    "new_empty",
    "new_empty_strided",
    "new_full",
    "new_ones",
    "new_tensor",
    "new_zeros",
)
"""Methods of `torch.Tensor` that take `device=` by keyword."""


def cpu_for(device: Any) -> Any:
    """Return the CPU where `device` names CUDA ("cuda", "cuda:1", an index, a torch.device).

    Anything else (None, "cpu", "meta") comes back as it is.
    """
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    return device


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a factory: CUDA devices become the CPU, and memory is not pinned."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = cpu_for(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _apply_factories() -> None:
    # `with torch.device("meta")` recognises factories by identity, in a cached set: fill it with
    # the originals, which are what a TorchFunctionMode is handed, before they are replaced.
    from torch.utils._device import _device_constructors

    _device_constructors()
    for owner, names in ((torch, FACTORIES), (torch.Tensor, TENSOR_METHODS)):
        for name in names:
            original = getattr(owner, name)
            wrapped = _on_cpu(original)
            setattr(owner, name, wrapped)
            rebind(original, wrapped)


def _apply_to() -> None:
    original = torch.Tensor.to

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            # The first positional is a device, a dtype or another tensor; only a device maps.
            args = (cpu_for(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = cpu_for(kwargs["device"])
        return original(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign]


def _itself(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stand in for what brings a tensor to the device's memory, which the host's is."""
    return tensor


def _apply_methods() -> None:
    torch.Tensor.cuda = torch.Tensor.pin_memory = _itself  # type: ignore[method-assign]
    # There is one queue, nothing to protect.
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]


def _apply_type_name() -> None:
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[assignment, method-assign]


PATCHES = (
    Patch(
        name="factory-functions",
        needed_by='megatron/core/pipeline_parallel/schedules.py: torch.zeros([], device="cuda")',
        why="about 150 tensors are created on the device by its literal name",
        apply=_apply_factories,
        still_needed=lambda: (
            raises(lambda: torch.zeros(1, device="cuda"))
            and 'device="cuda"' in megatron_source("core/pipeline_parallel/schedules.py")
        ),
    ),
    Patch(
        name="tensor-to",
        needed_by="megatron/core/transformer/moe/router.py: self.weight.data.to(device=...)",
        why="moves to the current device",
        apply=_apply_to,
        still_needed=lambda: (
            raises(lambda: torch.zeros(1).to("cuda"))
            and "to(device=torch.cuda.current_device())"
            in megatron_source("core/transformer/moe/router.py")
        ),
    ),
    Patch(
        name="tensor-cuda",
        needed_by="megatron/training/training.py: model_module.cuda(torch.cuda.current_device())",
        why="Tensor.cuda (also under Module.cuda), pin_memory and record_stream need a device",
        apply=_apply_methods,
        still_needed=lambda: (
            raises(lambda: torch.zeros(1).cuda())
            and "model_module.cuda(" in megatron_source("training/training.py")
        ),
    ),
    Patch(
        name="tensor-type-name",
        needed_by="megatron/core/optimizer/clip_grads.py: "
        "assert param.grad.type() == 'torch.cuda.FloatTensor'",
        why="gradient clipping and the optimizers sort parameters by the name of a CUDA type",
        apply=_apply_type_name,
        still_needed=lambda: (
            torch.zeros(1).type() == "torch.FloatTensor"
            and "== 'torch.cuda.FloatTensor'" in megatron_source("core/optimizer/clip_grads.py")
        ),
    ),
)
