"""GLM-4.5-MoE: DeepSeek-V3's experts and router under grouped attention."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import (
    ATTENTION,
    BIASED_ROUTER,
    ENDS,
    EXPERTS,
    MORE_TOKENS,
    MORE_TOKENS_COPIES,
    NORMS,
    SHARED_EXPERTS,
    mlp,
)
from megatron_mone.conversion.shape import (
    Shape,
    decoder,
    deepseek_experts,
    embeddings,
    grouped_attention,
    more_tokens,
    sigmoid_router,
)


def shape(config: HFConfig) -> Shape:
    """Half of each head turns with the position."""
    routed = deepseek_experts(config)
    attention = grouped_attention(config, qk_norm=config.truth("use_qk_norm", False))
    rest = sigmoid_router(config) | more_tokens(config) | embeddings(config)
    return decoder(config) | attention | routed | rest


PAIRS = (*ENDS, *NORMS, *ATTENTION, *mlp(), *EXPERTS, *BIASED_ROUTER, *SHARED_EXPERTS, *MORE_TOKENS)
FAMILY = Family("GLM-4.5-MoE", ("glm4_moe",), shape, PAIRS, MORE_TOKENS_COPIES)
