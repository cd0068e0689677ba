"""Process groups over gloo, and the two collectives whose gloo version wants equal sizes."""

import functools
from typing import Any

import torch
import torch.distributed as dist

from megatron_mone.common.patch import Patch, in_source, rebind


def gloo_for(backend: str | None) -> str:
    """Return the backend for a request: gloo for None or anything with nccl, else as asked."""
    if backend is None or "nccl" in str(backend).lower():
        return "gloo"
    return backend


def _apply_groups() -> None:
    original_init, original_new = dist.init_process_group, dist.new_group

    @functools.wraps(original_init)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        original_init(gloo_for(backend), *args, **kwargs)

    @functools.wraps(original_new)
    def new_group(
        ranks: Any = None,
        timeout: Any = None,
        backend: str | None = None,
        pg_options: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Backend None means the default group's: left alone, so that `fake` groups stay fake.
        backend = gloo_for(backend) if backend is not None else None
        kwargs.pop("device_id", None)
        return original_new(ranks, timeout, backend, None, *args, **kwargs)

    _replace("init_process_group", init_process_group)
    _replace("new_group", new_group)


def _apply_barrier() -> None:
    original = dist.barrier

    @functools.wraps(original)
    def barrier(
        group: Any = None, async_op: bool = False, device_ids: Any = None, **kwargs: Any
    ) -> Any:
        return original(group, async_op=async_op, **kwargs)

    _replace("barrier", barrier)


def _replace(name: str, wrapped: Any) -> None:
    """Set `wrapped` as `torch.distributed.<name>`, its defining module's, and Megatron's copies."""
    original = getattr(dist, name)
    setattr(dist, name, wrapped)
    setattr(dist.distributed_c10d, name, wrapped)
    rebind(original, wrapped)


class _Done:
    """The handle of a collective that has finished."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _padded(tensor: torch.Tensor, numel: int) -> torch.Tensor:
    """Return a flat copy of `tensor` with zeros up to `numel` elements."""
    flat = tensor.new_zeros(numel)
    flat[: tensor.numel()] = tensor.reshape(-1)
    return flat


def _apply_unequal() -> None:
    original_gather, original_scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(original_gather)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        # Every rank holds the list of outputs, so all ranks take the same branch.
        sizes = [output.numel() for output in tensor_list]
        if len(set(sizes)) <= 1:
            return original_gather(tensor_list, tensor, group, async_op)
        buffers = [tensor.new_empty(max(sizes)) for _ in sizes]
        original_gather(buffers, _padded(tensor, max(sizes)), group)
        for output, buffer, size in zip(tensor_list, buffers, sizes, strict=True):
            output.copy_(buffer[:size].view_as(output))
        return _Done() if async_op else None

    @functools.wraps(original_scatter)
    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [part.numel() for part in input_list]
        if len(set(sizes)) <= 1:
            return original_scatter(output, input_list, op, group, async_op)
        buffer = output.new_empty(max(sizes))
        original_scatter(buffer, [_padded(part, max(sizes)) for part in input_list], op, group)
        output.copy_(buffer[: output.numel()].view_as(output))
        return _Done() if async_op else None

    _replace("all_gather", all_gather)
    _replace("reduce_scatter", reduce_scatter)


def _gloo_refuses_unequal() -> bool:
    from megatron_mone.cpu_emulation.probes import unequal_gather_fails

    return unequal_gather_fails()


PATCHES = (
    Patch(
        name="process-groups",
        needed_by="megatron/training/initialize.py: init_process_group(args.distributed_backend)",
        why="the default backend is nccl, with options (streams, CTAs) that gloo does not know",
        apply=_apply_groups,
        still_needed=in_source("training/initialize.py", "'backend': args.distributed_backend"),
    ),
    Patch(
        name="barrier-device-ids",
        needed_by="megatron/core/parallel_state.py: barrier(device_ids=[current_device()])",
        why="gloo refuses device_ids",
        apply=_apply_barrier,
        still_needed=in_source(
            "core/parallel_state.py", "device_ids=[torch.cuda.current_device()]"
        ),
    ),
    Patch(
        name="unequal-collectives",
        needed_by="megatron/core/tensor_parallel/mappings.py: _gather_along_first_dim, "
        "_reduce_scatter_along_first_dim (output_split_sizes)",
        why="the all-to-all dispatcher at expert tensor parallel > 1 gathers unequal token counts; "
        "gloo wants equal ones",
        apply=_apply_unequal,
        still_needed=_gloo_refuses_unequal,
    ),
)
