"""Qwen2 and Qwen3: dense; Qwen2 has biases of q, k and v, Qwen3 norms of q and k."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import ATTENTION, ENDS, NORMS, mlp
from megatron_mone.conversion.shape import Shape, decoder, embeddings, grouped_attention


def shape(config: HFConfig) -> Shape:
    """`layer_types` names layers of sliding attention, which `decoder` tells of."""
    config.ignore("layer_types")
    second = config.word("model_type") == "qwen2"
    attention = grouped_attention(config, qkv_bias=second, qk_norm=not second)
    return decoder(config) | attention | embeddings(config)


PAIRS = (*ENDS, *NORMS, *ATTENTION, *mlp())
FAMILY = Family("Qwen", ("qwen2", "qwen3"), shape, PAIRS)
