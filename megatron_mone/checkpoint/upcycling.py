"""--moe-use-upcycling: a dense model's checkpoint becomes the weights of a run's experts.

Megatron 0.19's own way builds the dense model beside the other and ends in a TypeError. Here every
rank reads of each dense FFN the slices that its experts are copies of, as a load reads any other
weights, and draws the routers: what `megatron-mone convert upcycle` writes, to the bit, where its
--seed is the run's. Nothing is written before the run saves; from then on that is what is loaded.
May touch: Megatron's load of torch_dist checkpoints.
"""

import functools
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.checkpoint.safe_metadata import read_metadata
from megatron_mone.checkpoint.verify import folder_to_load
from megatron_mone.common.patch import wrapping

ROUTER_SPREAD = 0.05
"""Standard deviation of a fresh router's logits: all chosen experts weigh about the same."""
_OF_EXPERTS = re.compile(r"(.*\bmlp\.)(?:experts(?:\.experts)?|router)\.(.*)")
_MATRIX = re.compile(r"(?:mone_)?(linear_fc[12]\.weight)")
_CUTS = {"linear_fc1.weight": (0, 2), "linear_fc2.weight": (1, 1)}
"""Axis of the neurons, and how often they follow one another along it: gates, then ups."""


def random_router(experts: int, hidden: int, seed: int) -> Tensor:
    """[E, H] for inputs of a norm: logits of ROUTER_SPREAD, at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, hidden, generator=generator) * ROUTER_SPREAD / hidden**0.5


def upcycled_router(experts: int, granularity: int, hidden: int, seed: int, layer: int) -> Tensor:
    """[E, H] whose rows are equal for the `granularity` slices of one copy, which go together."""
    router = random_router(experts // granularity, hidden, seed + layer)
    return router.repeat_interleave(granularity, dim=0)


def begin(args: Namespace, given: Namespace, elsewhere: bool) -> None:
    """Have the run start from the dense checkpoint in --load until it has saved, then from --save.

    Args:
        args: Megatron's, validated; changed where moe_use_upcycling is set.
        given: as parsed, before Megatron's validation changed them.
        elsewhere: another machine will run this: no checkpoint is looked for.

    Raises:
        ValueError: there is no checkpoint, or it is not of a dense model of the right width.
    """
    if not args.moe_use_upcycling:
        return
    args.moe_use_upcycling = False  # from here on Megatron's way would begin
    args.no_load_optim, args.no_load_rng = given.no_load_optim, given.no_load_rng
    if args.load and args.load != args.save:
        args.pretrained_checkpoint, args.load = args.load, args.save
    if elsewhere:
        return
    folder = folder_to_load(args)
    metadata = None if folder is None else read_metadata(folder)
    if metadata is None:
        raise ValueError(
            f"moe_use_upcycling = True finds no torch_dist checkpoint in load = {args.load!r}: "
            "give --load the folder of the dense model's"
        )
    if Path(args.save) in folder.parents:  # type: ignore[union-attr]
        return
    held = metadata.state_dict_metadata
    if not is_dense(held):
        raise ValueError(
            f"moe_use_upcycling = True, and checkpoint {folder} has experts already: leave it out"
        )
    width = next((held[k].size[-2] // 2 for k in held if k.endswith("mlp.linear_fc1.weight")), None)
    wanted = args.moe_upcycling_granularity * args.moe_ffn_hidden_size
    if width != wanted:
        raise ValueError(
            f"moe_upcycling_granularity = {args.moe_upcycling_granularity} slices of "
            f"moe_ffn_hidden_size = {args.moe_ffn_hidden_size} neurons are not the gated FFN of "
            f"{width} in checkpoint {folder}: their product must be its width"
        )
    args.upcycles = True


def is_dense(held: Any) -> bool:
    """Whether a checkpoint with these keys has no experts."""
    return not any(_OF_EXPERTS.match(key) for key in held)


def ask_dense(state: Any, held: Any, granularity: int, seed: int) -> None:
    """Have a sharded state of MoNE layers ask for a dense model's weights, in place.

    Args:
        state: nested, of weights.
        held: key -> what is stored of it in the dense checkpoint.
        granularity: slices of a copy.
        seed: of the routers.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

    def asked(leaf: Any) -> Any:
        return of_dense(leaf) if isinstance(leaf, ShardedBase) else leaf

    def of_dense(leaf: Any) -> Any:
        found = _OF_EXPERTS.fullmatch(leaf.key)
        if found is None:
            if leaf.key not in held:  # norms of dense and of MoE layers in Transformer Engine's
                leaf.key = leaf.key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
            return leaf
        if matrix := _MATRIX.fullmatch(found[2]):
            return _slices(leaf, found[1] + matrix[1], granularity, *_CUTS[matrix[1]])
        if leaf.key.endswith(".router.weight"):
            dtype = held[f"{found[1]}linear_fc1.weight"].properties.dtype
            router = upcycled_router(leaf.data.shape[0], granularity, leaf.data.shape[1], seed,
                                     _layer_of(leaf))  # fmt: skip
            return LocalNonpersistentObject(router.to(dtype))
        assert not leaf.key.endswith("weight"), leaf.key
        return LocalNonpersistentObject(leaf.data)  # as a fresh run has it

    dict_list_map_inplace(asked, state)


def _layer_of(leaf: Any) -> int:
    """Its layer's number: along the first axis of a key for all layers, or in the key."""
    found = re.search(r"\blayers\.(\d+)\.", leaf.key)
    return int(found[1]) if found else leaf.global_offset[0]


def _slices(leaf: Any, key: str, granularity: int, axis: int, cuts: int) -> Any:
    """A factory of experts' pieces as one that asks once for each slice of the dense matrix."""
    places: list[tuple[int, ...]] = []

    def build(_key: str, *given: Any) -> list[Any]:
        pieces = [_of_dense(p, key, granularity, axis, cuts) for p in leaf.build_fn(_key, *given)]
        places[:] = [piece.global_offset for piece in pieces]
        return list(dict(zip(places, pieces, strict=True)).values())

    def merge(read: list[Tensor]) -> Tensor:
        at = dict(zip(dict.fromkeys(places), read, strict=True))
        return leaf.merge_fn([at[place] for place in places])

    return replace(leaf, key=key, build_fn=build, merge_fn=merge)


def _of_dense(piece: Any, key: str, granularity: int, axis: int, cuts: int) -> Any:
    """Where the neurons of one expert's piece, its expert along the last axis in front, lie in the
    dense matrix."""
    before = piece.prepend_axis_num - 1
    expert = piece.global_offset[before]
    whole, offset, parts = (
        [*of[:before], *of[before + 1 :]]
        for of in (piece.global_shape, piece.global_offset, piece.axis_fragmentations)
    )
    neurons = whole[before + axis] // cuts
    cut, within = divmod(offset[before + axis], neurons)
    offset[before + axis] = (cut * granularity + expert % granularity) * neurons + within
    whole[before + axis] *= granularity
    parts[before + axis] *= granularity
    return replace(
        piece, key=key, global_shape=tuple(whole), global_offset=tuple(offset),
        axis_fragmentations=tuple(parts), prepend_axis_num=before,
    )  # fmt: skip


def _upcycled(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def loaded(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        run = get_args()
        if getattr(run, "upcycles", False):
            held = read_metadata(Path(checkpoint_dir)).state_dict_metadata
            ask_dense(sharded_state_dict, held, run.moe_upcycling_granularity, run.seed)
            kwargs["validate_access_integrity"] = False  # ranks read the same slices
        return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return loaded


PATCHES = (
    wrapping(
        "upcycling",
        "megatron.training.checkpointing: dist_checkpointing.load",
        _upcycled,
        why="moe_use_upcycling gives load_checkpoint an argument that it does not take, and builds "
        "the dense model by arguments that the config does not follow",
        needed_while="state_dict = dist_checkpointing.load(",
    ),
)
