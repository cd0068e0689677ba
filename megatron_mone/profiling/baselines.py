"""The runs of a profile: the model under test, and baselines by name, as edits of its arguments.

    moe            stock Megatron experts of the same total size
    moe-active     stock experts cut to the parameters MoNE activates, (1 + 2 r) / 3 of the neurons
    grouped_mm     as moe, experts in torch's grouped_mm
    deepspeed      the model under test, stepped by DeepSpeed
    megatron       the same, where DeepSpeed steps the model under test, stepped by Megatron
    deepspeed-moe  as moe, in DeepSpeed's own MoE layer, stepped by DeepSpeed
    NAME:field=value[:field=value...]   the model under test with fields changed; of a name above,
                   that baseline

May touch: Megatron's argument parser, through the entry point's functions.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_mone.common.spelling import nearest_name
from megatron_mone.common.yaml_values import read_scalar
from megatron_mone.deepspeed.settings import (
    DEEPSPEED,
    MEGATRON,
    OF_DEEPSPEED,
    OF_MEGATRON,
    is_deepspeed,
)
from megatron_mone.deepspeed.supported import check_engine, check_package, check_settings

MAIN = "mone"
MULTIPLE = 16  # of the neurons of a cut expert, so that GEMMs keep whole vectors
# What ranks share: a run that changes one of these needs process groups of its own.
LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "micro_batch_size", "global_batch_size", "seq_length",
)  # fmt: skip


@dataclass(frozen=True)
class RunSpec:
    """One run of a profile.

    Attributes:
        name: in reports.
        fields: Megatron arguments that differ from the model under test, given as flags.
        edit: changes the parsed arguments further, before Megatron validates them.
        grouped_mm: whether the experts are torch's grouped_mm.
        by_deepspeed: whether DeepSpeed steps it.
        deepspeed_moe: whether the MoE layers are DeepSpeed's.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Namespace], None] = lambda args: None
    grouped_mm: bool = False
    by_deepspeed: bool = False
    deepspeed_moe: bool = False


def run_specs(against: Sequence[str]) -> list[RunSpec]:
    """The model under test, then each baseline.

    Args:
        against: baselines by name, as in `--against`.

    Raises:
        ValueError: an unknown or repeated name, or a field without a value.
    """
    specs = [RunSpec(MAIN)]
    for text in against:
        name, *changes = text.split(":")
        if not changes and name not in _NAMED:
            raise ValueError(
                f"--against {name!r} is not a baseline: name {', '.join(_NAMED)}, or write "
                f"NAME:field=value{nearest_name(name, list(_NAMED))}"
            )
        if name in [spec.name for spec in specs]:
            raise ValueError(f"--against names {name!r} twice: each run needs a name of its own")
        specs.append(replace(_NAMED.get(name, RunSpec(name)), fields=_fields(text, changes)))
    return specs


def _dense(args: Namespace) -> None:
    for name in _MONE_SWITCHES:
        setattr(args, name, None)


def _dense_active(args: Namespace) -> None:
    width = args.moe_ffn_hidden_size
    ratio = args.mone_neuron_ratio or (args.mone_neurons_per_token or 0) / width
    if not ratio:
        raise ValueError(
            "--against moe-active needs a MoNE model to cut to: set mone_neuron_ratio in --config"
        )
    _dense(args)
    cut = round(width * (1 + 2 * ratio) / 3 / MULTIPLE) * MULTIPLE
    args.moe_ffn_hidden_size = max(MULTIPLE, cut)


def _deepspeed(args: Namespace) -> None:
    if is_deepspeed(args):
        raise ValueError(
            "--against deepspeed: the run under test is stepped by DeepSpeed already: write "
            "megatron for Megatron's engine, or NAME:zero_stage=N"
        )
    args.engine = DEEPSPEED
    for name in (*OF_MEGATRON, "gradient_accumulation_fusion"):
        setattr(args, name, False)


def _megatron(args: Namespace) -> None:
    if not is_deepspeed(args):
        raise ValueError(
            "--against megatron: the run under test is stepped by Megatron already: write "
            "deepspeed for DeepSpeed's engine"
        )
    args.engine = MEGATRON
    for name in OF_DEEPSPEED:
        setattr(args, name, None)


def _deepspeed_moe(args: Namespace) -> None:
    _dense(args)
    if not is_deepspeed(args):
        _deepspeed(args)


_MONE_SWITCHES = (
    "mone_neuron_ratio", "mone_neurons_per_token", "mone_record_masks", "mone_replay_masks",
)  # fmt: skip
_NAMED = {
    "moe": RunSpec("moe", edit=_dense),
    "moe-active": RunSpec("moe-active", edit=_dense_active),
    "grouped_mm": RunSpec("grouped_mm", edit=_dense, grouped_mm=True),
    "megatron": RunSpec("megatron", edit=_megatron),
    "deepspeed": RunSpec("deepspeed", edit=_deepspeed, by_deepspeed=True),
    "deepspeed-moe": RunSpec(
        "deepspeed-moe", edit=_deepspeed_moe, by_deepspeed=True, deepspeed_moe=True
    ),
}


def _fields(text: str, changes: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not name:
            raise ValueError(f"--against {text!r}: write NAME:field=value[:field=value...]")
        if name in LAYOUT:
            raise ValueError(
                f"--against {text!r} changes {name}: all runs of a profile share the layout and "
                "the tokens; profile the other layout in a job of its own"
            )
        try:
            fields[name] = read_scalar(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--against {text!r}: {name} cannot be read") from error
    return fields


def parse_run(spec: RunSpec, base: Namespace, words: Sequence[str]) -> Namespace:
    """Arguments of a further run in a process that has parsed its first.

    Args:
        spec: the run.
        base: the first run's validated arguments.
        words: that they were read from; they are parsed anew and changed.

    Raises:
        ValueError: Megatron refuses the run, or it is laid out otherwise than the first.
    """
    from megatron.training import arguments

    from megatron_mone.model.arguments import reading

    args = arguments.parse_args(reading([*words, *_as_flags(spec)]))
    spec.edit(args)
    try:
        check_engine(args)
        check_package(args)
        arguments.validate_args(args)
        check_settings(args)
    except ValueError as error:
        raise ValueError(f"run {spec.name}: {error}") from error
    except AssertionError as error:
        raise ValueError(f"run {spec.name}: Megatron refuses the arguments: {error}") from error
    for name in LAYOUT:
        if getattr(args, name) != getattr(base, name):
            raise ValueError(
                f"run {spec.name} has {name} = {getattr(args, name)}, the first run has "
                f"{getattr(base, name)}: all runs of a profile share the layout"
            )
    args.padded_vocab_size = base.padded_vocab_size  # Megatron sets it with the tokenizer
    return args


def _as_flags(spec: RunSpec) -> list[str]:
    from megatron_mone.model.arguments import flag_parser
    from megatron_mone.model.run_config import to_flags

    return to_flags(spec.fields, flag_parser(), Path(f"--against {spec.name}"))
