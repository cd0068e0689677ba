"""A Megatron model without memory: what its checkpoint holds, by name, and where each part goes.

The model is built by the trainer's own builder on one rank under torch's FakeTensorMode, and asked
for its sharded state dict: keys, stacked layers, experts and vocabulary are Megatron's, not ours.
May touch: Megatron's globals, parallel state and the ranks' environment, as they were at the end.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.config_checks import layer_pattern
from megatron_mone.conversion.pairs import Sizes

TRAINING_STATE = frozenset({"mlp.experts.ng_weights"})
"""Tensors of a checkpoint that no output depends on."""
OF_CHOICE = TRAINING_STATE | {"mlp.experts.neuron_bias"}
"""Of layers that choose neurons."""
LAYER_NAME = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(.+)")
_ALONE = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
"""What a rank on its own has in its environment while the model is built."""
_MTP_LAYER = re.compile(r"(transformer_layer|mtp_model_layer)\.")


@dataclass(frozen=True)
class Slot:
    """One tensor of the model.

    Attributes:
        name: as in the state dict.
        leaf: Megatron's ShardedTensor or ShardedTensorFactory, whose data is fake.
        layer: number of its layer, those of multi-token prediction after the decoder's; None
            outside of layers.
        within: its name without its layer's; "mtp." and more of what is beside such a layer.
    """

    name: str
    leaf: Any
    layer: int | None
    within: str

    @classmethod
    def of(cls, name: str, leaf: Any, layers: int) -> Slot:
        """Of a model with so many layers in its decoder."""
        found = LAYER_NAME.fullmatch(name)
        if found is None:
            return cls(name, leaf, None, name)
        number, within = int(found[2]), found[3]
        if found[1] == "mtp":
            number += layers
            inner = _MTP_LAYER.match(within)
            within = within[inner.end() :] if inner else f"mtp.{within}"
        return cls(name, leaf, number, within)

    @property
    def fake(self) -> Tensor:
        """Shape and dtype; no values."""
        return self.leaf.data

    def pieces(self, data: Tensor) -> list[Any]:
        """The ShardedTensors that hold `data`, of the model's shape or on meta."""
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

        if isinstance(self.leaf, ShardedTensorFactory):
            return list(nested_values(replace(self.leaf, data=data).build()))
        return [replace(self.leaf, data=data, dtype=data.dtype)]


@dataclass(frozen=True)
class BareModel:
    """What a checkpoint of a model holds.

    Attributes:
        args: Megatron's, validated.
        config: its TransformerConfig.
        slots: its tensors, in order.
        objects: names of what is no tensor (extra states of layers), one ShardedObject each.
    """

    args: Namespace
    config: Any
    slots: list[Slot]
    objects: list[Any]

    @property
    def sizes(self) -> Sizes:
        """What the table of pairs asks for."""
        args = self.args
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        latent = bool(args.multi_latent_attention)
        return Sizes(args.num_attention_heads, groups, args.vocab_size, latent)


@contextmanager
def bare_model(
    words: Sequence[str], padded_vocab_size: int | None = None, *,
    held: Collection[str] | None = None, plain: bool = False,
) -> Iterator[BareModel]:  # fmt: skip
    """Build the model of `words`, Megatron's flags and ours, in this process.

    Args:
        words: of one rank.
        padded_vocab_size: rows of the embedding; those that the flags give when None.
        held: keys of a checkpoint that is read, which are then the model's; None: of one written.
        plain: one that is written has the keys of a stock model (mone_plain_checkpoint).

    Raises:
        ValueError: one line: Megatron or a check of ours refuses the flags.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_mone import cpu_emulation

    if not torch.cuda.is_available():
        cpu_emulation.install()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.training import destroy_global_state

    from megatron_mone.model import patches
    from megatron_mone.model.arguments import parse_arguments
    from megatron_mone.model.checks.hybrid import check_gpt
    from megatron_mone.model.config_builder import build_model_config
    from megatron_mone.moe.stored_choice import name_as_held

    patches.install()
    before = {name: os.environ.get(name) for name in _ALONE}
    os.environ.update(_ALONE)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron's table of all arguments
            args = parse_arguments(words, elsewhere=True)
            check_gpt(args, "converted")
        args.padded_vocab_size = padded_vocab_size or args.padded_vocab_size or args.vocab_size
        config = build_model_config(args, elsewhere=True)
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config.transformer.perform_initialization = False
        config.transformer.mone_plain_checkpoint = plain
        builder = config.get_builder_cls()(config)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        alone = Replaced(torch.distributed, "all_gather_object", _of_one_rank)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with alone, fake, _all_chosen(config.transformer) as choosing:
            model = builder.build_model(groups, pre_process=True, post_process=True)
            state = model.sharded_state_dict(metadata=_metadata(config.transformer, held, plain))
        if held is not None:
            name_as_held(state, held)
        elif not plain:
            _state_choice(state, config.transformer, choosing)
        objects = [leaf for leaf in state.values() if isinstance(leaf, ShardedObject)]
        slots = [
            Slot.of(name, leaf, args.num_layers)
            for name, leaf in state.items()
            if isinstance(leaf, ShardedTensor | ShardedTensorFactory)
        ]
        slots = [one for one in slots if one.within not in OF_CHOICE or choosing(one.layer)]
        yield BareModel(args, config.transformer, slots, objects)
    finally:
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        destroy_global_state()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _metadata(config: Any, held: Collection[str] | None, plain: bool) -> dict[str, bool]:
    """Whether each layer has keys of its own, as Megatron's `sharded_state_dict` is told."""
    from megatron_mone.moe.stored_choice import is_mixed

    alone = not plain and hasattr(config, "mone_layer_freq") and is_mixed(config)
    if held is not None:
        alone = any(LAYER_NAME.match(key) for key in held if key.startswith("decoder."))
    return {"non_homogeneous_layers": alone}


def _state_choice(
    state: dict[str, Any], config: Any, choosing: Callable[[int | None], bool]
) -> None:
    """Of a state that is written: what the layers that choose do, and stock keys of the others,
    which were built as if they chose."""
    from megatron_mone.moe.stored_choice import CHOICE, choice_of, stock_key

    for name, leaf in list(state.items()):
        if choosing(Slot.of(name, leaf, config.num_layers).layer):
            if name.endswith(f".{CHOICE}"):
                leaf.data = choice_of(config)
        elif name.endswith(f".{CHOICE}"):
            del state[name]
        else:
            leaf.key = stock_key(leaf.key)


@contextmanager
def _all_chosen(config: Any) -> Iterator[Callable[[int | None], bool]]:
    """Build experts that choose in every layer with experts: a stock layer's are stored alike.

    Args:
        config: the TransformerConfig; mone_layer_freq is as it was at the end.

    Yields:
        Whether a layer, by its number, chooses.
    """
    if not hasattr(config, "mone_layer_freq"):
        yield lambda layer: False
        return
    kinds, freq = layer_pattern(config), config.mone_layer_freq
    config.mone_layer_freq = 1
    try:
        yield lambda layer: layer is not None and kinds[min(layer, len(kinds) - 1)] == 2
    finally:
        config.mone_layer_freq = freq


def _of_one_rank(found: list[Any], own: Any, group: Any = None) -> None:
    """all_gather_object, which reads a size on the way and so cannot run without values."""
    found[:] = [own]
