"""What the routed experts keep for the backward pass, handed to Megatron's activation offloading.

Megatron copies to the host what a module saves between a group's start and its commit, and brings
it back before the group's backward pass (megatron/core/pipeline_parallel/
fine_grained_activation_offload.py). Its experts are two such groups, one after the other:
`expert_fc1`, which saves the input, and `moe_act`, which saves the activation's. Here one function
saves both at once, so both groups are open around it, and what it saves goes to its own: the input
rows to `expert_fc1`, gate, up and index of the kept neurons (and of the reference backend all else
that it computes) to `moe_act`. A commit copies, so both follow the experts. Weights stay. May
touch: the offload manager of this process, by its own functions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    PipelineOffloadManager,
    fine_grained_offloading_group_offload,
    fine_grained_offloading_group_start,
)
from torch import Tensor

from megatron_mone.kernels import GroupedMLPOutput

INPUT, KEPT = "expert_fc1", "moe_act"


def offloaded_modules(config: Any) -> tuple[str, ...]:
    """Of --offload-modules those that are of the routed experts, in the order of their groups.

    Args:
        config: the transformer config.
    """
    asked = config.offload_modules or () if config.fine_grained_activation_offloading else ()
    return tuple(name for name in (INPUT, KEPT) if name in asked)


def with_offloading(
    names: Sequence[str],
    x_NH: Tensor,
    weights: Sequence[Tensor],
    compute: Callable[[Tensor], GroupedMLPOutput],
    *,
    delay: bool,
) -> GroupedMLPOutput:
    """The experts, with what they keep handed over.

    Args:
        names: of `offloaded_modules`.
        x_NH: [N, H] input rows.
        weights: the experts' parameters, whose views are saved and stay.
        compute: the experts, of x_NH.
        delay: copy after the CUDA graph under way (delay_offload_until_cuda_graph).
    """
    groups: dict[str, _Group] = {}
    for name in names:
        x_NH = fine_grained_offloading_group_start(x_NH, name)
        handler = PipelineOffloadManager.get_instance().cur_forward_chunk()
        if handler is not None and handler.do_offload:  # else nothing is offloaded now
            groups[name] = _Group(handler)
    if not groups:
        return compute(x_NH)
    # By identity: addresses of tensors without values are all 0.
    stay = {weight.untyped_storage()._cdata for weight in weights}
    own = x_NH.untyped_storage()._cdata

    def pack(kept: Tensor) -> Any:
        place = kept.untyped_storage()._cdata
        group = groups.get(INPUT if place == own else KEPT)
        return kept if group is None or place in stay else group.push(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        output = compute(x_NH)
    y_NH = output.y_NH
    for name in groups:
        y_NH = fine_grained_offloading_group_offload(y_NH, name, delay_offload=delay)
    return output._replace(y_NH=y_NH)


class _Group:
    """A group that was just started, which takes tensors while another one is open.

    Args:
        handler: of the micro-batch under way; Megatron's ChunkOffloadHandler.
    """

    def __init__(self, handler: Any) -> None:
        self._handler, self._number = handler, handler._offloaded_group_index
        self._count = 0

    def push(self, kept: Tensor) -> Any:
        """What autograd is to hold: the tensor's place in the group and the order of its
        dimensions, or itself (`tensor_push`)."""
        # It comes back contiguous: as it lay, or products of it would round otherwise. A part of a
        # tensor stays.
        order = sorted(range(kept.dim()), key=kept.stride, reverse=True)
        laid = kept.permute(order)
        if not laid.is_contiguous() or not self._handler._can_manage_tensor_for_offload(kept):
            return kept
        tag = self._number, self._count
        self._count += 1
        self._handler.offload_groups[self._number - 1].push_tensor(tag, laid)
        return tag, order


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    tag, order = kept
    found: Tensor = PipelineOffloadManager.get_instance().cur_backward_chunk().tensor_pop(tag)
    return found.permute([order.index(dimension) for dimension in range(len(order))])
