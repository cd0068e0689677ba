"""Fully sharded data parallelism on CPU ranks: torch's FSDP2 and Megatron's own, over gloo.

Both name the CUDA device outright, in meshes of ranks and in texts such as `cuda:0`, where the
emulation's device is the CPU; what they compute is untouched.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch.distributed import DeviceMesh

from megatron_mone.common.patch import Patch, in_source, wrap, wrapping
from megatron_mone.cpu_emulation.device import cpu_for

_FSDP = "megatron.core.distributed.fsdp"
_OWN = f"{_FSDP}.src.megatron_fsdp"
_NAME_DEVICES = (
    f"{_FSDP}.mcore_fsdp_adapter", f"{_OWN}.megatron_fsdp", f"{_OWN}.param_and_grad_buffer",
    f"{_OWN}.utils",
)  # fmt: skip


class _CpuMesh:
    """Stands in for the DeviceMesh that a module makes of its groups."""

    @staticmethod
    def from_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        del device_type
        return DeviceMesh.from_group(group, "cpu", *args, **kwargs)


class _KindOfDevice(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch.device)

    def __call__(cls, device: Any, *index: Any) -> Any:
        # f"cuda:{torch.cuda.current_device()}" reads cuda:cpu here.
        cpu = cpu_for(device)
        return torch.device(cpu, *index) if cpu is device else cpu


class _Device(metaclass=_KindOfDevice):
    """torch.device, which says CPU where CUDA is named."""


class _Torch:
    """The module torch, as one module sees it, with another `device`."""

    device = _Device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _apply_devices() -> None:
    for name in _NAME_DEVICES:
        wrap(import_module(name), "torch", lambda stock: _Torch())


def _unfused(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prepare)
    def prepared(grad_data: Any, scaling_factor: Any, ddp_config: Any) -> Any:
        plain = replace(ddp_config, gradient_reduce_div_fusion=False)
        return prepare(grad_data, scaling_factor, plain)

    return prepared


def _in_any_order(validate_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(validate_args)
    def validated(args: Any, *rest: Any, **named: Any) -> Any:
        sharded = args.use_torch_fsdp2 or args.use_megatron_fsdp
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32" if sharded else "1"
        return validate_args(args, *rest, **named)

    return validated


PATCHES = (
    wrapping(
        "fsdp2-mesh",
        "megatron.core.distributed.torch_fully_sharded_data_parallel: DeviceMesh",
        lambda stock: _CpuMesh,
        why="FSDP2 shards over a mesh of CUDA devices",
        needed_while='DeviceMesh.from_group(self.process_group, "cuda")',
    ),
    wrapping(
        "megatron-fsdp-mesh",
        f"{_FSDP}.mcore_fsdp_adapter: DeviceMesh",
        lambda stock: _CpuMesh,
        why="Megatron FSDP shards over a mesh of CUDA devices",
        needed_while='device_type="cuda"',
    ),
    Patch(
        name="megatron-fsdp-devices",
        needed_by="megatron/core/distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py: "
        'torch.device(f"cuda:{torch.cuda.current_device()}")',
        why="the device is put together from text, and buffers are made on it",
        apply=_apply_devices,
        still_needed=in_source(
            "core/distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py",
            'torch.device(f"cuda:{torch.cuda.current_device()}")',
        ),
    ),
    wrapping(
        "premultiplied-sum",
        f"{_OWN}.param_and_grad_buffer: gradient_reduce_preprocessing",
        _unfused,
        why="gloo has no sum that multiplies first; multiplied in a step of its own",
        needed_while="torch.distributed._make_nccl_premul_sum(scaling_factor)",
    ),
    wrapping(
        "launch-order-of-shards",
        "megatron.training.arguments: validate_args",
        _in_any_order,
        why="sharded weights forbid the launch order that tensor parallelism asks for; a CPU rank "
        "has one queue, so either holds",
        needed_while="FSDP requires CUDA_DEVICE_MAX_CONNECTIONS > 1 or unset.",
    ),
)
