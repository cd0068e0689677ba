"""Qwen2-MoE and Qwen3-MoE: layers with and without experts; Qwen2 adds a gated shared expert."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import ATTENTION, ENDS, EXPERTS, LAYER, NORMS, Pair, mlp
from megatron_mone.conversion.shape import (
    Shape,
    decoder,
    embeddings,
    experts,
    grouped_attention,
    softmax_router,
)


def shape(config: HFConfig) -> Shape:
    """Layer n has experts where n + 1 divides by the step and it is not named as dense."""
    second = config.word("model_type") == "qwen2_moe"
    config.ignore("layer_types")
    qkv_bias = config.truth("qkv_bias", True) if second else False
    attention = grouped_attention(config, qkv_bias=qkv_bias, qk_norm=not second)
    layers, step = config.size("num_hidden_layers"), config.size("decoder_sparse_step", 1)
    named = config.layers("mlp_only_layers", layers)
    shared = config.size("shared_expert_intermediate_size") if second else 0
    routed = experts(
        config, width="moe_intermediate_size", shared=shared,
        dense=[n for n in range(layers) if (n + 1) % step or n in named],
    )  # fmt: skip
    if second:
        routed["moe_shared_expert_gate"] = True
    router = softmax_router(config, normalised=config.truth("norm_topk_prob", False))
    return decoder(config) | attention | routed | router | embeddings(config)


PAIRS = (
    *ENDS, *NORMS, *ATTENTION, *mlp(), *EXPERTS,
    *mlp("mlp.shared_experts.", LAYER + "mlp.shared_expert."),
    Pair("mlp.shared_experts.gate_weight", LAYER + "mlp.shared_expert_gate.weight"),
)  # fmt: skip
FAMILY = Family("Qwen-MoE", ("qwen2_moe", "qwen3_moe"), shape, PAIRS)
