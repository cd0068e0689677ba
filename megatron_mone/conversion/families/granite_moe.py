"""Granite-MoE: as Mixtral, with four multipliers."""

from megatron_mone.conversion.families import Family, mixtral
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import ATTENTION, ENDS, LAYER, NORMS, FusedExperts, Pair
from megatron_mone.conversion.shape import Shape, multipliers


def shape(config: HFConfig) -> Shape:
    """Scores are multiplied by 1 where the config does not say."""
    return mixtral.shape(config) | multipliers(config, attention=1.0)


PAIRS = (
    *ENDS, *NORMS, *ATTENTION,
    Pair("mlp.router.weight", LAYER + "block_sparse_moe.router.layer.weight"),
    FusedExperts("mlp.experts.linear_fc1", LAYER + "block_sparse_moe.input_linear.weight"),
    FusedExperts("mlp.experts.linear_fc2", LAYER + "block_sparse_moe.output_linear.weight"),
)  # fmt: skip
FAMILY = Family("Granite-MoE", ("granitemoe",), shape, PAIRS)
