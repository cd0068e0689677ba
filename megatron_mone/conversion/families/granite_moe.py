"""Granite-MoE: as Mixtral, with four multipliers that Megatron has not."""

from megatron_mone.conversion.families import Family, mixtral
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.shape import Shape


def shape(config: HFConfig) -> Shape:
    """The multipliers are told of: they change values, no size."""
    for name in ("embedding_multiplier", "logits_scaling", "residual_multiplier"):
        config.unless(name, 1.0, "not multiplied here")
    config.unless("attention_multiplier", None, "scores are divided by the root of a head's size")
    return mixtral.shape(config)


FAMILY = Family("Granite-MoE", ("granitemoe",), shape)
