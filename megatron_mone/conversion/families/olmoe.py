"""OLMoE: every layer has experts, of whose softmax over all the chosen part is taken."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import ATTENTION, ENDS, EXPERTS, NORMS
from megatron_mone.conversion.shape import (
    Shape,
    decoder,
    embeddings,
    experts,
    grouped_attention,
    softmax_router,
)


def shape(config: HFConfig) -> Shape:
    """Its intermediate size is an expert's; it norms q and k over all heads at once."""
    config.unless("clip_qkv", None, "q, k and v are not clipped here")
    config.unless("attention_bias", False, "q, k and v have biases here, the output has none")
    routed = experts(config, width="intermediate_size", dense=[])
    router = softmax_router(config, normalised=config.truth("norm_topk_prob", False))
    attention = grouped_attention(config, qk_norm=True, all_heads=True)
    return decoder(config) | attention | routed | router | embeddings(config)


PAIRS = (*ENDS, *NORMS, *ATTENTION, *EXPERTS)
FAMILY = Family("OLMoE", ("olmoe",), shape, PAIRS)
