"""A checkpoint alone -> the arguments of the model that it holds. May touch: the checkpoint."""

from collections.abc import Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_OF_MODEL = (
    "num_experts", "seq_length", "max_position_embeddings", "position_embedding_type",
    "use_rotary*", "rotary_*", "use_rope_scaling", "rope_scaling_factor", "rope_type", "swiglu",
    "squared_relu", "normalization", "norm_epsilon", "untie_embeddings_and_output_weights",
    "group_query_attention", "multi_latent_attention", "apply_layernorm_1p", "qk_layernorm",
    "tokenizer_*", "vocab_size", "vocab_file", "merge_file", "special_tokens", "tiktoken_*",
    "make_vocab_size_divisible_by", "transformer_impl", "bf16", "fp16", "distributed_backend",
    "gradient_accumulation_fusion", "bias_swiglu_fusion", "bias_gelu_fusion", "apply_rope_fusion",
    "cross_entropy_loss_fusion", "create_attention_mask_in_dataloader", "mtp_*", "ckpt_format",
    "add_position_embedding", "quick_geglu", "yarn_*", "no_persist_layer_norm",
    "heterogeneous_layers_*", "hybrid_layer_pattern",
)  # fmt: skip
"""Beside the fields of Megatron's TransformerConfig and ours."""


def saved_arguments(folder: Path) -> dict[str, Any]:
    """All arguments of the run that wrote a torch_dist checkpoint, as Megatron validated them.

    Args:
        folder: of the iteration.

    Raises:
        ValueError: the checkpoint holds no arguments.
    """
    from megatron.core import dist_checkpointing

    from megatron_mone.checkpoint.safe_metadata import load_weights_only, read_metadata

    read_metadata(folder)
    load_weights_only()
    try:
        return dict(vars(dist_checkpointing.load_common_state_dict(str(folder))["args"]))
    except Exception as error:
        raise ValueError(
            f"checkpoint {folder} holds no arguments of its model ({type(error).__name__}): give "
            "the run file too, --config RUN.yaml"
        ) from error


def model_values(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Of all arguments of a run those that make its model, where they are not the parser's own.

    Args:
        saved: name -> value, as Megatron validated them.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_mone.config import MONE_FIELD_NAMES
    from megatron_mone.model.arguments import flag_parser

    own = {field.name for field in fields(MLATransformerConfig)}
    own -= {field.name for field in fields(ModelParallelConfig)}
    own |= set(MONE_FIELD_NAMES) - {"mone_plain_checkpoint", "mone_change_choice"}
    found = {}
    for action in flag_parser()._actions:
        name = action.dest
        value = saved.get(name)
        wanted = name in own or any(fnmatchcase(name, pattern) for pattern in _OF_MODEL)
        plain = isinstance(value, bool | int | float | str | list)
        if wanted and plain and value != action.default:
            found[name] = value
    if pattern := found.get("hybrid_layer_pattern"):
        found["hybrid_layer_pattern"] = pattern.replace("|", "")  # which cuts it for one layout
        found.pop("mtp_num_layers", None)  # of the pattern
    if not found.get("group_query_attention"):
        found.pop("num_query_groups", None)  # validation sets it
    return found
