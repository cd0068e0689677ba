"""Mixtral: every layer has experts, probabilities are a softmax of the chosen ones."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.shape import (
    Shape,
    decoder,
    embeddings,
    experts,
    grouped_attention,
    softmax_router,
)


def shape(config: HFConfig) -> Shape:
    """Its intermediate size is an expert's."""
    routed = experts(config, width="intermediate_size", dense=[])
    attention = grouped_attention(config)
    router = softmax_router(config, normalised=True)
    return decoder(config) | attention | routed | router | embeddings(config)


FAMILY = Family("Mixtral", ("mixtral",), shape)
