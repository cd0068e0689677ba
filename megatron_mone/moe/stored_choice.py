"""How a checkpoint says that its experts choose neurons, and how stock Megatron stops at it.

Experts of ours are stock experts in shape: read under stock keys they keep every neuron, and what
they score is not what was trained, without a word. Megatron's load asks for the keys of its own
model and by default looks for no others (--dist-ckpt-strictness assume_ok_unexpected), so a key
that is too many stops nothing. A checkpoint of ours therefore lacks the stock keys of the experts
that choose, in weights and in optimizer state: in their place it has `mone_linear_fc1` and
`mone_linear_fc2`, and beside them `mone_choice`, what each layer chooses and how (of fsdp_dtensor:
shard_checkpoint.py). Stock
checkpoints, older ones and those of mone_plain_checkpoint have stock keys; what is asked for is
renamed to what is there. May touch: Megatron's loading of torch_dist checkpoints.
"""

import contextlib
import functools
import json
import re
import warnings
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
)

from megatron_mone.common.patch import in_source, wrapping
from megatron_mone.config_checks import is_mone, layer_pattern, neurons_per_token, selection_bounds

CHOICE = "mone_choice"
FP8_HISTORY = "fp8_amax"
_STOCK = re.compile(r"\bexperts\.(\d+\.)?linear_fc")
_OURS = re.compile(r"\bexperts\.(\d+\.)?mone_linear_fc")
Choice = dict[str, Any]


def our_key(key: str) -> str:
    """A key of routed experts, of weights or optimizer state, as experts that choose have it."""
    return _STOCK.sub(r"experts.\1mone_linear_fc", key)


def stock_key(key: str) -> str:
    """The opposite of `our_key`."""
    return _OURS.sub(r"experts.\1linear_fc", key)


def choice_of(config: Any) -> Choice:
    """What decides which neurons a model computes, in one form whatever fields say it.

    Args:
        config: a config with mone_* fields, or Megatron's validated arguments.

    Returns:
        Field -> value: plain data. What the rule does not read is None.
    """
    low, high = selection_bounds(config)
    bounded = config.mone_selection == "threshold"
    return {
        "mone_neurons_per_token": neurons_per_token(config),
        "mone_activation": config.mone_activation,
        "mone_selection": config.mone_selection,
        "mone_threshold": config.mone_threshold if bounded else None,
        "mone_min_neurons_per_token": low if bounded else None,
        "mone_max_neurons_per_token": high if bounded else None,
        "mone_neuron_groups": config.mone_neuron_groups,
        "mone_neuron_block": config.mone_neuron_block,
        "mone_ng_loss_type": "bias" if config.mone_ng_loss_type == "bias" else None,
        "mone_layer_freq": [int(kind == 2) for kind in layer_pattern(config)],
    }


def check_choice(saved: Choice, config: Any, where: str) -> None:
    """Compare the choice in a checkpoint with that of a run.

    Args:
        saved: of the checkpoint.
        config: of the run, as of `choice_of`; without a mone_* field that turns MoNE on it keeps
            every neuron.
        where: names the checkpoint in the message.

    Raises:
        ValueError: one line: the first field that differs, both values and the fix; a warning where
            mone_change_choice is given.
    """
    if not is_mone(config):
        raise ValueError(
            f"{where} holds experts that choose neurons (mone_neurons_per_token = "
            f"{saved.get('mone_neurons_per_token')}), this run has no mone_* field and would keep "
            "every one: give the fields it was trained with, or mone_neuron_ratio = 1.0 and "
            "--mone-change-choice to keep every one"
        )
    for name, value in choice_of(config).items():
        before = saved.get(name)
        if name == "mone_layer_freq" and before and len(before) != len(value):
            # A GPT's checkpoint in a hybrid model, whose layers of experts stand by themselves.
            value = [int(kind == 2) for kind in layer_pattern(config) if kind]
        if before == value:
            continue
        said = f"{where} was trained with {name} = {before}, this run has {name} = {value}"
        if not config.mone_change_choice:
            raise ValueError(
                f"{said}: give what it was trained with, or --mone-change-choice to go on with "
                "another choice"
            )
        warnings.warn(said, stacklevel=2)


def is_mixed(config: Any) -> bool:
    """Whether some MoE layers of a model choose and others do not, which differ in their keys."""
    return is_mone(config) and {1, 2} <= set(layer_pattern(config))


def name_as_held(state: Any, held: Collection[str]) -> None:
    """Have a sharded state ask for experts by the keys that a checkpoint has, in place.

    Args:
        state: nested, of weights and optimizer.
        held: keys of the checkpoint; those of objects end in "/shard_...". Where it has no history
            of fp8's delayed scaling, that starts anew, as Transformer Engine's does.
    """
    there = {key.partition("/shard_")[0] for key in held}

    def named(leaf: Any) -> Any:
        if not isinstance(leaf, ShardedBase) or leaf.key in there:
            return leaf
        if leaf.key.endswith(f".{FP8_HISTORY}"):  # saved without delayed scaling: none yet
            return LocalNonpersistentObject(leaf.data)
        if isinstance(leaf, ShardedObject) and leaf.key.endswith(f".{CHOICE}"):
            return LocalNonpersistentObject(leaf.data)
        for other in (stock_key(leaf.key), our_key(leaf.key)):
            if other in there:
                leaf.key = other
        return leaf

    dict_list_map_inplace(named, state)


_noted: list[weakref.ref[Any]] = []


def note_model(config: Any) -> None:
    """Remember the model of this process, for scripts whose arguments have no mone_* fields."""
    _noted[:] = [weakref.ref(config)]  # which knows its optimizer by a method


def model_of(args: Any) -> Any:
    """The arguments, or the config of the model that was built where they say nothing of MoNE;
    None: a stock model."""
    noted = _noted[0]() if _noted else None
    found = args if hasattr(args, "mone_layer_freq") else noted
    return found if found is not None and is_mone(found) else None


def _as_held(load: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

    def of_experts(leaf: Any) -> bool:
        return isinstance(leaf, ShardedBase) and our_key(leaf.key) != stock_key(leaf.key)

    @functools.wraps(load)
    def loaded(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(of_experts, nested_values(sharded_state_dict))):
            with contextlib.suppress(OSError):  # Megatron's load says what is missing
                there = _get_filesystem_reader(checkpoint_dir).read_metadata()
                name_as_held(sharded_state_dict, there.state_dict_metadata)
        return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return loaded


def _by_layer(build: Callable[..., Any]) -> Callable[..., Any]:
    """Layers of one kind are saved as one tensor of all; where some choose, those of a key would
    not fill it, and each layer has its own (megatron/core/transformer/transformer_block.py)."""

    @functools.wraps(build)
    def built(args: Any, *rest: Any, **named: Any) -> Any:
        metadata, model = build(args, *rest, **named), model_of(args)
        mixed = model is not None and is_mixed(model)
        return {**metadata, "non_homogeneous_layers": True} if mixed else metadata

    return built


STOPS = ("local_experts.0.linear_fc1.weight", "linear_fc1.weight0")
"""Of experts, the first weight in a stock model's modules: SequentialMLP's, TEGroupedMLP's."""


def _with_stops(generate: Callable[..., Any]) -> Callable[..., Any]:
    """In --ckpt-format torch and fsdp_dtensor modules are saved by their own names, ours among
    them, and a load can pass over what it does not find: the one that misses names is tried again
    and leaves those weights as they were made (megatron/training/checkpointing.py:
    load_model_state_dict), the other allows partial loads. A wrong size neither takes."""

    @functools.wraps(generate)
    def generated(args: Any, *rest: Any, **named: Any) -> Any:
        state, model = generate(args, *rest, **named), model_of(args)
        loading = (named.get("optim_sd_kwargs") or {}).get("is_loading")
        if model is None or model.mone_plain_checkpoint or loading:
            return state
        if args.ckpt_format == "torch":
            for name, part in state.items():
                if re.fullmatch(r"model\d*", name):
                    _add_stops(part, STOPS, choice_of(model))
        elif args.ckpt_format == "fsdp_dtensor":  # which cuts up what is not plain text
            gates = [f"{name}_w" for name in STOPS]
            _add_stops(state["model"], gates, json.dumps(choice_of(model)))
        return state

    return generated


def _add_stops(state: dict[str, Any], names: Collection[str], choice: Choice | str) -> None:
    for key in [key for key in state if key.endswith(".experts.linear_fc1")]:
        experts = key.removesuffix("linear_fc1")
        state |= {experts + name: torch.empty(0) for name in names}
        state[experts + CHOICE] = choice


PATCHES = (
    wrapping(
        "keys-as-held",
        "megatron.training.checkpointing: dist_checkpointing.load",
        _as_held,
        why="experts that choose have keys of their own, for stock models to stop at, and are "
        "loaded from checkpoints that have not",
        needed_while="state_dict = dist_checkpointing.load(",
    ),
    wrapping(
        "no-second-try",
        "megatron.training.checkpointing: generate_state_dict",
        _with_stops,
        why="a stock model that reads the experts of another finds none of its weights, prints so, "
        "and goes on with random ones",
        needed_while="load_return = module.load_state_dict(state_dict, strict=False)",
    ),
    wrapping(
        "keys-by-layer",
        "megatron.training.checkpointing: _build_sharded_state_dict_metadata",
        _by_layer,
        why="where MoE layers are of two kinds a checkpoint of stacked layers has holes",
        needed_while=in_source(
            "core/transformer/transformer_block.py", "metadata.get(\n            'non_homogeneous"
        ),
    ),
)
