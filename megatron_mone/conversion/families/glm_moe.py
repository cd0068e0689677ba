"""GLM-4.5-MoE: DeepSeek-V3's experts and router under grouped attention."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.shape import (
    Shape,
    decoder,
    embeddings,
    experts,
    grouped_attention,
    more_tokens,
    sigmoid_router,
)


def shape(config: HFConfig) -> Shape:
    """Half of each head turns with the position."""
    width, layers = config.size("moe_intermediate_size"), config.size("num_hidden_layers")
    routed = experts(
        config, width="moe_intermediate_size",
        dense=list(range(min(config.count("first_k_dense_replace"), layers))),
        shared=width * config.count("n_shared_experts"),
    )  # fmt: skip
    attention = grouped_attention(config, qk_norm=config.truth("use_qk_norm", False))
    rest = sigmoid_router(config) | more_tokens(config) | embeddings(config)
    return decoder(config) | attention | routed | rest


FAMILY = Family("GLM-4.5-MoE", ("glm4_moe",), shape)
