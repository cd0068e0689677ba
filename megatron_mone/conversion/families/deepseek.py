"""DeepSeek-V2 and V3: latent attention, first layers dense, experts that all tokens pass."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import (
    BIASED_ROUTER,
    ENDS,
    EXPERTS,
    LATENT_ATTENTION,
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
    expert_groups,
    latent_attention,
    more_tokens,
    sigmoid_router,
    softmax_router,
    topk_scale,
)


def shape(config: HFConfig) -> Shape:
    """V3 chooses by sigmoid and bias, V2 by softmax, in groups of experts where it says so."""
    third = config.word("model_type") == "deepseek_v3"
    routed = deepseek_experts(config)
    config.ignore("topk_method", "scoring_func")
    router = sigmoid_router(config) if third else _softmax_groups(config)
    rest = more_tokens(config) | embeddings(config)
    return decoder(config) | latent_attention(config) | routed | router | rest


def _softmax_groups(config: HFConfig) -> Shape:
    found: Shape = {}
    if config.word("topk_method", "greedy") == "group_limited_greedy":
        found |= expert_groups(config, best=1)
    config.ignore("n_group", "topk_group")
    found |= topk_scale(config)
    coefficient = config.number("aux_loss_alpha", 1e-3)
    router = softmax_router(config, normalised=config.truth("norm_topk_prob", False))
    return found | router | {"moe_aux_loss_coeff": coefficient}


PAIRS = (
    *ENDS,
    *NORMS,
    *LATENT_ATTENTION,
    *mlp(),
    *EXPERTS,
    *BIASED_ROUTER,
    *SHARED_EXPERTS,
    *MORE_TOKENS,
)
FAMILY = Family("DeepSeek", ("deepseek_v2", "deepseek_v3"), shape, PAIRS, MORE_TOKENS_COPIES)
