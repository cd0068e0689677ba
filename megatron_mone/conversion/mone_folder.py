"""A MoNE model of ours as a Hugging Face folder: its config.json, its code, its tensors' names.

The class that reads it stands in hf_model/; here is how Megatron's arguments and tensors get there.
May touch: the folder.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_mone.common.checked_json import load
from megatron_mone.common.files import write_json
from megatron_mone.conversion.hf_config import CONFIG
from megatron_mone.conversion.hf_model.folder import AUTO_MAP, copy_code

GENERATION = "generation_config.json"
_FIX = "copy the file again"
_ONLY: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",), "position_embedding_type": ("rope",), "swiglu": (True,),
    "add_bias_linear": (False,), "apply_layernorm_1p": (False, None), "mtp_num_layers": (None, 0),
    "softmax_type": ("vanilla", None), "attention_output_gate": (False, None),
    "window_size": (None,), "qk_clip": (False, None),
    "moe_apply_probs_on_input": (False, None), "moe_latent_size": (None,),
    "rotary_interleaved": (False, None), "rotary_seq_len_interpolation_factor": (None, 1),
}  # fmt: skip
"""What the exported class computes; another value of a model's argument is refused."""
_ROUTER_DTYPES = {None: None, "fp32": "float32", "fp64": "float64"}
_SAME = (
    "hidden_size", "num_attention_heads", "num_experts", "moe_router_topk", "mone_neuron_ratio",
    "mone_neurons_per_token", "mone_activation", "mone_selection", "mone_threshold",
    "mone_min_neurons_per_token", "mone_max_neurons_per_token", "mone_neuron_groups",
    "mone_neuron_block", "max_position_embeddings",
)  # fmt: skip
_RENAMED = {"moe_router_topk": "num_experts_per_tok"}


def config_of(args: Namespace, config: Any, dtype: str) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        args: Megatron's, validated; padded_vocab_size is the rows of its embedding, padding
            included: they take part in the softmax that was trained.
        config: its TransformerConfig.
        dtype: of its weights, by torch's name.

    Raises:
        ValueError: an argument of which the exported class computes nothing; one line.
    """
    for name, known in _ONLY.items():
        value = getattr(args, name, known[0])
        if value not in known:
            raise ValueError(
                f"{name} = {value!r}: a MoNE model of transformers has {name} = {known[0]!r} alone"
            )
    if args.num_experts is None:
        raise ValueError("num_experts is not set: a MoNE model has experts; give --like FOLDER")
    if not hasattr(config, "mone_layer_freq"):
        raise ValueError(
            "no mone_ argument was given: the experts are stock Megatron's, not a MoNE model's; "
            "give --like FOLDER, or train with --mone-neuron-ratio 1, which is the same model"
        )
    found = {_RENAMED.get(name, name): getattr(args, name) for name in _SAME}
    sparse = _frequency(config.moe_layer_freq, args.num_layers)
    choosing = _frequency(config.mone_layer_freq, args.num_layers)
    found |= {
        "model_type": "mone",
        "architectures": ["MoNEForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        "vocab_size": args.padded_vocab_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_key_value_heads": config.num_query_groups or args.num_attention_heads,
        "head_dim": config.kv_channels,
        "rms_norm_eps": config.layernorm_epsilon,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "attention_bias": bool(config.add_qkv_bias),
        "qk_norm": bool(config.qk_layernorm),
        "qk_norm_all_heads": config.mone_qk_norm_all_heads,
        "embedding_multiplier": config.mup_embedding_mult if config.use_mup else 1.0,
        "attention_multiplier": None if args.multi_latent_attention else config.softmax_scale,
        "residual_multiplier": config.mone_residual_multiplier,
        "logits_scaling": 1 / config.mup_output_mult if config.use_mup else 1.0,
        "rope_parameters": _rope(args, config),
        "mlp_layer_types": ["sparse" if one else "dense" for one in sparse],
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "shared_expert_gate": bool(config.moe_shared_expert_gate),
        "router_score_function": config.moe_router_score_function,
        "router_pre_softmax": bool(config.moe_router_pre_softmax),
        "router_dtype": _ROUTER_DTYPES[config.moe_router_dtype],
        "router_expert_bias": bool(config.moe_router_enable_expert_bias),
        "routed_scaling_factor": config.moe_router_topk_scaling_factor or 1.0,
        "n_group": config.moe_router_num_groups,
        "topk_group": config.moe_router_group_topk,
        "mone_selection_bias": config.mone_ng_loss_type == "bias",
        "mone_layers": [n for n in range(args.num_layers) if sparse[n] and choosing[n]],
        "initializer_range": config.init_method_std,
    }
    if found["mone_neurons_per_token"] is not None:
        del found["mone_neuron_ratio"]
    if args.multi_latent_attention:
        found |= {
            "num_key_value_heads": args.num_attention_heads,
            "kv_lora_rank": config.kv_lora_rank,
            "q_lora_rank": config.q_lora_rank,
            "qk_nope_head_dim": config.qk_head_dim,
            "qk_rope_head_dim": config.qk_pos_emb_head_dim,
            "v_head_dim": config.v_head_dim,
            "head_dim": config.qk_pos_emb_head_dim,
        }
    return found


def _frequency(value: Any, layers: int) -> list[int]:
    """Of every layer, whether it has what the argument says."""
    if isinstance(value, int):
        return [int(n % value == 0) for n in range(layers)]
    return list(value)


def _rope(args: Namespace, config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if args.multi_latent_attention and config.rope_type == "yarn":
        return found | {
            "rope_type": "yarn",
            "factor": config.rotary_scaling_factor,
            "original_max_position_embeddings": config.original_max_position_embeddings,
            "mscale": config.mscale,
            "mscale_all_dim": config.mscale_all_dim,
            "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow,
        }
    if args.rotary_percent != 1:
        found["partial_rotary_factor"] = args.rotary_percent
    if args.use_rope_scaling:
        found |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return found


def generation_of(source: Path, rows: int) -> dict[str, Any]:
    """The generation_config.json of a model with the tokenizer of `source`; empty without one, and
    where `source` has its own, which travels as it is.

    It names the token that ends a text and rules out ids that stand for no text: rows of padding
    take part in the softmax that was trained, but are never to be generated.

    Args:
        source: folder of a tokenizer, or of the model that was imported.
        rows: of the embedding.

    Raises:
        ValueError: a file there that cannot be read; one line.
    """
    tokenizer, settings = source / "tokenizer.json", source / "tokenizer_config.json"
    if not tokenizer.is_file() or (source / GENERATION).is_file():
        return {}
    try:
        tokens = Tokenizer.from_file(str(tokenizer)).get_vocab()
    except Exception as error:  # the library has no narrower one
        raise ValueError(f"{tokenizer} is no tokenizer ({error}): {_FIX}") from error
    found: dict[str, Any] = {}
    end = load(settings, _FIX).get("eos_token") if settings.is_file() else None
    end = end.get("content") if isinstance(end, dict) else end
    if end in tokens:
        found["eos_token_id"] = tokens[end]
    if padding := list(range(max(tokens.values(), default=-1) + 1, rows)):
        found["suppress_tokens"] = padding
    return found


def write_beside(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> None:
    """config.json, the code that it names, and generation_config.json where it says anything.

    Raises:
        ValueError: a field that MoNEConfig refuses.
    """
    from megatron_mone.conversion.hf_model.configuration_mone import MoNEConfig

    MoNEConfig(**json.loads(json.dumps(config)))
    write_json(folder / CONFIG, config)
    if generation:
        write_json(folder / GENERATION, generation)
    copy_code(folder)
