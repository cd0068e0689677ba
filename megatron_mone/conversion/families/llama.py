"""Llama and Mistral: a dense SwiGLU decoder."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import ATTENTION, ENDS, NORMS, mlp
from megatron_mone.conversion.shape import Shape, decoder, embeddings, grouped_attention


def shape(config: HFConfig) -> Shape:
    """Its output projection has a bias where q, k and v have one; Megatron's has none."""
    config.unless("attention_bias", False, "q, k and v have biases here, the output has none")
    return decoder(config) | grouped_attention(config) | embeddings(config)


PAIRS = (*ENDS, *NORMS, *ATTENTION, *mlp())
FAMILY = Family("Llama", ("llama", "mistral"), shape, PAIRS)
