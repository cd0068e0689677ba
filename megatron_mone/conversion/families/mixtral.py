"""Mixtral: every layer has experts, probabilities are a softmax of the chosen ones."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import ATTENTION, ENDS, NORMS, routed
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


PAIRS = (
    *ENDS, *NORMS, *ATTENTION,
    *routed(
        "block_sparse_moe.gate.weight",
        *(f"block_sparse_moe.experts.{{e}}.{w}.weight" for w in ("w1", "w3", "w2")),
    ),
)  # fmt: skip
FAMILY = Family("Mixtral", ("mixtral",), shape, PAIRS)
