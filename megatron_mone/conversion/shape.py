"""Parts of a model's shape that families share: config.json fields -> Megatron's arguments.

Shapes are those of Megatron's command line (`megatron-mone train`), so that a model file of
configs/model is one dictionary of them.
"""

from typing import Any

from megatron_mone.conversion.hf_config import HFConfig

Shape = dict[str, Any]

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # by version and family
_TP_UP_TO = 128  # a vocabulary that divides by as many ranks needs no padding rows


def decoder(config: HFConfig) -> Shape:
    """Layers, widths, norms, vocabulary and rotary embeddings of a SwiGLU decoder."""
    gate, window = config.word("hidden_act", "silu"), "all layers attend to all tokens here"
    if gate not in ("silu", "swish"):
        raise ValueError(
            f"{config.path}: hidden_act = {gate!r}: only silu, the gate of SwiGLU, is translated"
        )
    config.ignore("sliding_window")  # where it is switched off
    config.unless("use_sliding_window", False, window)
    if config.truth("use_sliding_window", True):
        config.unless("sliding_window", None, window)
    config.unless("mlp_bias", False, "MLPs have no biases here")
    return {
        "num_layers": config.size("num_hidden_layers"),
        "hidden_size": config.size("hidden_size"),
        "ffn_hidden_size": config.size("intermediate_size"),
        "num_attention_heads": config.size("num_attention_heads"),
    }


def embeddings(config: HFConfig) -> Shape:
    """What stands at the end of a model file: activation, norm, rotary embeddings, vocabulary."""
    vocabulary = config.size("vocab_size")
    found = {
        "swiglu": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.number("rms_norm_eps", 1e-6),
        **_rotary(config),
        "attention_dropout": config.number("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not config.truth("tie_word_embeddings", False),
        "init_method_std": config.number("initializer_range", 0.02),
        "max_position_embeddings": config.size("max_position_embeddings"),
        "vocab_size": vocabulary,
    }
    ranks = vocabulary & -vocabulary  # the largest power of two that divides it
    if ranks > 1:
        found["make_vocab_size_divisible_by"] = vocabulary // min(ranks, _TP_UP_TO)
    return found


def _rotary(config: HFConfig) -> Shape:
    """Of either place that it stands in: transformers 5's rope_parameters, or rope_scaling."""
    rope = config.part("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    latent = config.has("kv_lora_rank")
    kind = rope.word("rope_type", rope.word("type", "default"))
    share = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    found: Shape = {
        "position_embedding_type": "rope",
        "rotary_base": rope.number("rope_theta", config.number("rope_theta", 10000)),
    }
    if share != 1:
        found["rotary_percent"] = share
    if kind == "yarn" and latent:
        found["rotary_scaling_factor"] = rope.number("factor")
        found["mscale"] = rope.number("mscale", 1.0)
        found["mscale_all_dim"] = rope.number("mscale_all_dim", 0.0)
    elif kind == "llama3":
        found |= {"use_rope_scaling": True, "rope_scaling_factor": rope.number("factor", 8.0)}
    elif kind != "default":
        config.notes.append(
            f"rope_type = {kind[:80]!r}: positions are not scaled here; sizes are the same"
        )
    if latent and kind != "yarn":
        found["rope_type"] = "rope"  # Megatron's latent attention takes yarn by itself
    return found


def grouped_attention(
    config: HFConfig, *, qkv_bias: bool = False, qk_norm: bool = False, all_heads: bool = False
) -> Shape:  # fmt: skip
    """Heads that share keys and values.

    Args:
        config: of the model.
        qkv_bias: whether q, k and v have biases where the config does not say.
        qk_norm: whether q and k are normalised.
        all_heads: over all heads at once, not head by head.
    """
    heads = config.size("num_attention_heads")
    groups = config.size("num_key_value_heads", heads)
    found: Shape = {
        "kv_channels": config.size("head_dim", max(1, config.size("hidden_size") // heads))
    }
    if groups != heads:
        found |= {"group_query_attention": True, "num_query_groups": groups}
    if config.truth("attention_bias", qkv_bias):
        found["add_qkv_bias"] = True
    if qk_norm:
        found["qk_layernorm"] = True
    if all_heads:
        found["mone_qk_norm_all_heads"] = True
    return found


def latent_attention(config: HFConfig) -> Shape:
    """DeepSeek's multi-head latent attention."""
    config.ignore("num_key_value_heads", "head_dim", "qk_head_dim")
    config.unless("attention_bias", False, "latent attention has no biases here")
    found: Shape = {
        "kv_channels": config.size("v_head_dim"),
        "qk_layernorm": True,
        "multi_latent_attention": True,
        "kv_lora_rank": config.size("kv_lora_rank"),
        "qk_head_dim": config.size("qk_nope_head_dim"),
        "qk_pos_emb_head_dim": config.size("qk_rope_head_dim"),
        "v_head_dim": config.size("v_head_dim"),
    }
    if config.has("q_lora_rank"):
        found["q_lora_rank"] = config.size("q_lora_rank")
    return found


def experts(config: HFConfig, *, width: str, dense: list[int], shared: int = 0) -> Shape:
    """Routed experts, and those that all tokens pass.

    Args:
        config: of the model.
        width: field of F.
        dense: layers without experts.
        shared: width of the shared expert; 0 is none.
    """
    number = next((name for name in _EXPERTS if config.has(name)), _EXPERTS[0])
    found: Shape = {"num_experts": config.size(number)}
    layers = config.size("num_hidden_layers")
    if dense:
        found["moe_layer_freq"] = layer_pattern([int(n not in dense) for n in range(layers)])
    found["moe_ffn_hidden_size"] = config.size(width)
    if shared:
        found["moe_shared_expert_intermediate_size"] = shared
    found["moe_router_topk"] = config.size("num_experts_per_tok")
    if found["moe_router_topk"] > found["num_experts"]:
        raise ValueError(
            f"{config.path}: num_experts_per_tok = {found['moe_router_topk']} is more than the "
            f"{found['num_experts']} experts"
        )
    return found


def deepseek_experts(config: HFConfig) -> Shape:
    """`experts` by DeepSeek's names: the first layers dense, experts that all tokens pass."""
    first = min(config.count("first_k_dense_replace"), config.size("num_hidden_layers"))
    shared = config.size("moe_intermediate_size") * config.count("n_shared_experts")
    dense = list(range(first))
    return experts(config, width="moe_intermediate_size", dense=dense, shared=shared)


def expert_groups(config: HFConfig, *, best: int) -> Shape:
    """Experts in groups, of which a token's experts are in a few.

    Megatron takes the groups with the largest sum of as many experts as each has to give.

    Args:
        config: of the model.
        best: as many experts are summed there.
    """
    groups, chosen = config.size("n_group"), config.size("topk_group")
    summed = max(1, config.size("num_experts_per_tok") // chosen)
    if summed != best:
        config.notes.append(
            f"topk_group = {chosen}: a group of experts is chosen by the sum of its best {summed} "
            f"here, of its best {best} there"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def topk_scale(config: HFConfig) -> Shape:
    """What the chosen experts' probabilities are multiplied by, in DeepSeek's name."""
    scale = config.number("routed_scaling_factor", 1.0)
    return {} if scale == 1.0 else {"moe_router_topk_scaling_factor": scale}


def softmax_router(config: HFConfig, *, normalised: bool) -> Shape:
    """Probabilities by softmax: of the chosen experts' logits, or of all (`normalised` false)."""
    found: Shape = {} if normalised else {"moe_router_pre_softmax": True}
    return found | {
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": config.number("router_aux_loss_coef", 1e-3),
    }


def sigmoid_router(config: HFConfig) -> Shape:
    """DeepSeek-V3's: sigmoid scores, a bias that balances, experts in groups."""
    found: Shape = {}
    if config.size("n_group", 1) > 1:
        found |= expert_groups(config, best=2)
    config.ignore("topk_group")
    config.unless("norm_topk_prob", True, "probabilities are divided by their sum here")
    found["moe_router_score_function"] = "sigmoid"
    return (
        found
        | topk_scale(config)
        | {
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 1e-3,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": config.number("aux_loss_alpha", 1e-4),
        }
    )


def more_tokens(config: HFConfig) -> Shape:
    """Multi-token prediction, under either name of its field."""
    depth = config.count("num_nextn_predict_layers", config.count("num_mtp_layers"))
    return {"mtp_num_layers": depth, "mtp_loss_scaling_factor": 0.1} if depth else {}


def multipliers(config: HFConfig, attention: float) -> Shape:
    """Granite's four numbers: Megatron's MuP at the model's own width, where it changes nothing
    else, and ours of the residual stream.

    Args:
        config: of the model.
        attention: what scores are multiplied by where the config does not say.
    """
    embedding, logits = (
        config.number(name, 1.0) for name in ("embedding_multiplier", "logits_scaling")
    )
    scores = config.number("attention_multiplier", attention)
    residual = config.number("residual_multiplier", 1.0)
    for name, value in (("logits_scaling", logits), ("attention_multiplier", scores)):
        if value <= 0:
            raise ValueError(f"{config.path}: {name} = {value} must be above 0")
    found: Shape = {}
    heads = config.size("num_attention_heads")
    plain = config.size("head_dim", config.size("hidden_size") // heads) ** -0.5
    if (embedding, logits, scores) != (1.0, 1.0, plain):
        found |= {
            "use_mup": True,
            "mup_embedding_mult": embedding,
            "mup_output_mult": 1 / logits,
            "mup_base_head_dim": scores**2,  # Megatron multiplies by its root
            "mup_attn_scale_power": 0.0,
        }
    if residual != 1.0:
        found["mone_residual_multiplier"] = residual
    return found


def layer_pattern(has_experts: list[int]) -> str:
    """Megatron's moe_layer_freq: runs of layers with and without experts, "([0]*3+[1]*58)"."""
    runs: list[list[int]] = []
    for kind in has_experts:
        if runs and runs[-1][0] == kind:
            runs[-1][1] += 1
        else:
            runs.append([kind, 1])
    return "(" + "+".join(f"[{kind}]*{length}" for kind, length in runs) + ")"
