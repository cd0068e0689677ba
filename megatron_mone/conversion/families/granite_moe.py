"""Granite-MoE: as Mixtral, with four multipliers that Megatron has not."""

from megatron_mone.conversion.families import Family, mixtral
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import ATTENTION, ENDS, LAYER, NORMS, FusedExperts, Pair
from megatron_mone.conversion.shape import Shape


def shape(config: HFConfig) -> Shape:
    """The multipliers are told of: they change values, no size."""
    for name in ("embedding_multiplier", "logits_scaling", "residual_multiplier"):
        config.unless(name, 1.0, "not multiplied here")
    size = config.size("hidden_size") // config.size("num_attention_heads")
    config.unless(
        "attention_multiplier", size**-0.5, "scores are divided by the root of a head's size"
    )
    return mixtral.shape(config)


PAIRS = (
    *ENDS, *NORMS, *ATTENTION,
    Pair("mlp.router.weight", LAYER + "block_sparse_moe.router.layer.weight"),
    FusedExperts("mlp.experts.linear_fc1", LAYER + "block_sparse_moe.input_linear.weight"),
    FusedExperts("mlp.experts.linear_fc2", LAYER + "block_sparse_moe.output_linear.weight"),
)  # fmt: skip
FAMILY = Family("Granite-MoE", ("granitemoe",), shape, PAIRS)
