"""gpt-oss: refused, for what its experts are."""

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.shape import Shape


def shape(config: HFConfig) -> Shape:
    """There is none."""
    raise ValueError(
        f"{config.path}: model_type = 'gpt_oss': its experts have biases and a gate that is "
        "clamped and shifted, and a neuron with a bias is not zero where it is not chosen: MoNE "
        "has no such expert"
    )


FAMILY = Family("gpt-oss", ("gpt_oss",), shape)
