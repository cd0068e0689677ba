"""Gathers a model's parameters, or their gradients, into the tensors one rank would hold.

Megatron's sharded state dict says where each rank's piece lies in the whole tensor; that is also
what makes checkpoints independent of the layout.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def gather_whole(chunks: list[Any], values: Callable[[Any], Tensor | None]) -> dict[str, Tensor]:
    """Whole tensors by checkpoint key on rank 0, nothing on the others.

    Args:
        chunks: model chunks of this rank, wrapped or not.
        values: the tensor to take in a parameter's place; None: the parameter itself.
    """
    models = [_unwrap(chunk) for chunk in chunks]
    saved = [(p, p.data) for model in models for p in model.parameters()]
    try:
        for parameter, data in saved:
            value = values(parameter)
            parameter.data = data if value is None else value.to(data.dtype)
        pieces = [piece for model in models for piece in _pieces(model.sharded_state_dict())]
    finally:
        for parameter, data in saved:
            parameter.data = data
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, pieces)
    whole: dict[str, Tensor] = {}
    if torch.distributed.get_rank() == 0:
        filled: dict[str, Tensor] = {}
        for key, shape, index, data in (piece for rank in everyone for piece in rank):
            whole.setdefault(key, torch.zeros(shape, dtype=data.dtype))[index] = data
            filled.setdefault(key, torch.zeros(shape, dtype=torch.bool))[index] = True
        for key, seen in filled.items():
            assert seen.all(), f"{key}: no rank holds {int((~seen).sum())} of its entries"
    return whole


def all_gather_reduced(chunks: Iterable[Any]) -> None:
    """With the distributed optimizer each rank has reduced its share of the gradients: join them.

    The shares are equal parts of each bucket, in rank order.
    """
    for chunk in chunks:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                share = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=ranks)


def _pieces(state: Any) -> Iterable[tuple]:
    """(key, global shape, place, data) of every main replica's tensor in a sharded state dict; a
    stock model's key where experts choose neurons."""
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        is_main_replica,
    )

    from megatron_mone.moe.stored_choice import stock_key

    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        for value in state:
            yield from _pieces(value)
    elif isinstance(state, ShardedTensorFactory):
        yield from _pieces(state.build())
    elif isinstance(state, ShardedTensor) and is_main_replica(state.replica_id):
        assert state.data is not None
        yield (
            stock_key(state.key),
            state.global_shape,
            state.global_slice(),
            state.data.detach().clone(),
        )


def _unwrap(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model
