"""Experts in Megatron FSDP's checkpoints (--ckpt-format fsdp_dtensor), one by one.

Megatron cuts a gated linear_fc1 there into its gate and its up, and numbers experts over all
expert-parallel ranks, by the names and the axes of stock experts. Those of a rank are one
parameter here, under one name on every rank; saved as it is, one rank's experts would stand for
all. Each is saved by itself instead, under the keys that torch_dist has for single experts,
`experts.3.mone_linear_fc1.weight_w` [F, H], `..._v` and `experts.3.mone_linear_fc2.weight`, with
the optimizer state of each: any number of ranks reads them. fc2 lies neuron-major, [F, H], not as
stock has it: what a rank holds of it are rows of that, which no other view makes rows of [H, F].
So stock checkpoints of this format are not read, nor is a plain one written.
May touch: Megatron's preparation of fsdp_dtensor states.
Symbols: E_l experts of this rank, F neurons of an expert, F_l on this rank (F / ETP), H hidden.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import copy_tensor_model_parallel_attributes
from torch import Tensor

from megatron_mone.common.patch import wrapping
from megatron_mone.moe.experts import MoNEExperts

_MATRICES = {
    "linear_fc1": ("mone_linear_fc1.weight_w", "mone_linear_fc1.weight_v"),
    "linear_fc2": ("mone_linear_fc2.weight",),
}
"""Parameter -> keys of its matrices [F, H], in the order in which an expert holds them."""
_PER_EXPERT = {"neuron_bias": True, "ng_weights": True, "fp8_amax": False}
"""Buffer [E_l, ...] -> whether its next axis is that of neurons, cut over expert-tensor ranks."""


def split_experts(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """The state with experts, their buffers and their optimizer state in pieces. Collective.

    Args:
        state: "model" and perhaps "optimizer" as Megatron made them, of DTensors over the ranks.
        model: whose state it is, a MegatronFSDP.

    Returns:
        A new state of views: what is loaded into the pieces is loaded into the model.
    """
    found = {_plain(n): m for n, m in model.named_modules() if isinstance(m, MoNEExperts)}
    state = {**state, "model": dict(state["model"])}
    for key in list(state["model"]):
        path, _, name = key.rpartition(".")
        experts = found.get(_plain(path))
        if experts is not None and (name in _MATRICES or name in _PER_EXPERT):
            cut = _matrices if name in _MATRICES else _per_expert
            value = state["model"].pop(key)
            state["model"] |= {f"{path}.{k}": v for k, v in cut(experts, name, value)}
    if state.get("optimizer", {}).get("state"):
        moments = dict(state["optimizer"]["state"])
        for key in list(moments):
            path, _, name = key.rpartition(".")
            if _plain(path) in found and name in _MATRICES:
                moments |= _of_matrices(found[_plain(path)], path, name, moments.pop(key))
        state["optimizer"] = {**state["optimizer"], "state": moments}
    return state


def _plain(path: str) -> str:
    """A module's path without the wrappers around the model."""
    while path.startswith("module."):
        path = path.removeprefix("module.")
    return path


def _of_matrices(experts: MoNEExperts, path: str, name: str, state: dict) -> dict[str, dict]:
    """Optimizer state of a parameter -> that of each of its matrices."""
    parameter = getattr(experts, name)
    cut: dict[str, dict] = {}
    for what, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            for key, piece in _matrices(experts, name, value):
                cut.setdefault(f"{path}.{key}", {})[what] = piece
    others = {what: value for what, value in state.items() if what not in next(iter(cut.values()))}
    return {key: {**pieces, **others} for key, pieces in cut.items()}


def _matrices(experts: MoNEExperts, name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """(key, [F, H]) of each matrix in a DTensor of the parameter's shape."""
    parameter: Any = getattr(experts, name)
    keys = _MATRICES[name]
    neurons = experts.config.moe_ffn_hidden_size // experts.etp_group.size()
    hidden = value.shape[-1]
    held = parameter.megatron_fsdp_slice
    local = value.to_local().view(-1)
    size = neurons * hidden
    for place in range(experts.num_local_experts * len(keys)):
        start, stop = (min(max(at, held.start), held.stop) - held.start
                       for at in (place * size, (place + 1) * size))  # fmt: skip
        e, half = divmod(place, len(keys))
        piece = local[start:stop].view(-1, hidden)
        shape = (neurons, hidden)
        yield f"{_number(experts, e)}.{keys[half]}", _over_ranks(experts, piece, shape, True, True)


def _per_expert(experts: MoNEExperts, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    for e, piece in enumerate(value):
        cut = _PER_EXPERT[name]
        whole = _over_ranks(experts, piece, tuple(piece.shape), cut, False)
        yield f"{_number(experts, e)}.{name}", whole


def _number(experts: MoNEExperts, e: int) -> int:
    return int(experts.ep_group.rank()) * experts.num_local_experts + e


def _over_ranks(
    experts: MoNEExperts, local: Tensor, shape: tuple[int, ...], cut: bool, sharded: bool
) -> Tensor:
    """A DTensor of what this rank holds.

    Args:
        experts: whose ranks.
        local: rows of it, a view.
        shape: of the whole on one expert-tensor rank.
        cut: the first axis is cut over expert-tensor ranks.
        sharded: and over replicas.
    """
    from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
        make_fsdp_dtensor,
    )

    one_rank: Any = torch.empty(shape, device="meta")
    if cut:
        copy_tensor_model_parallel_attributes(one_rank, experts.linear_fc1)
        one_rank.partition_dim = 0
    fc1: Any = experts.linear_fc1
    return make_fsdp_dtensor(
        local.detach(), one_rank, dist_index=fc1.megatron_fsdp_dist_index, is_expert_param=True,
        is_sharded_param=sharded, run_check=True, update_uneven_dtensor_chunk_meta=True,
    )  # fmt: skip


class _Float32:
    """A MegatronFSDP without Float16Module, whose place in the names of parameters Megatron counts
    on (fsdp_dtensor_checkpoint.py: get_parameter(f"module.{key}"))."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, target: str) -> Any:
        return self._model.get_parameter(f"module.{_plain(target)}")


def _with_experts(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prepare)
    def prepared(args: Namespace, raw_state_dict: dict[str, Any], model: Any) -> Any:
        named = model if args.bf16 or args.fp16 else _Float32(model)
        return prepare(args, split_experts(raw_state_dict, model), named)

    return prepared


PATCHES = (
    wrapping(
        "expert-shards",
        "megatron.training.checkpointing: preprocess_fsdp_dtensor_state_dict",
        _with_experts,
        why="the experts of a rank are one parameter, whose name is the same on every rank; gate "
        "and up are not the halves of its first axis",
        needed_while="model_state_dict, optimizer_state_dict = handle_swiglu_in_state_dict(",
    ),
)
