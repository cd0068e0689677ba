"""MoNE: our own class of transformers (hf_model/), which `convert export --mone` writes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_mone.conversion.families import Family
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import (
    ATTENTION,
    BIASED_ROUTER,
    ENDS,
    LATENT_ATTENTION,
    LAYER,
    NORMS,
    SHARED_EXPERTS,
    FusedExperts,
    Pair,
    Sizes,
    View,
    mlp,
)
from megatron_mone.conversion.shape import (
    Shape,
    decoder,
    embeddings,
    experts,
    grouped_attention,
    latent_attention,
    layer_pattern,
    multipliers,
    softmax_router,
    topk_scale,
)

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"float32": "fp32", "float64": "fp64"}
_CHOICE: dict[str, Callable[..., Any]] = {
    "mone_neuron_ratio": HFConfig.number, "mone_neurons_per_token": HFConfig.size,
    "mone_activation": HFConfig.word, "mone_selection": HFConfig.word,
    "mone_threshold": HFConfig.number, "mone_min_neurons_per_token": HFConfig.size,
    "mone_max_neurons_per_token": HFConfig.size, "mone_neuron_groups": HFConfig.size,
    "mone_neuron_block": HFConfig.size,
}  # fmt: skip
"""Fields that have the same name and meaning here, and how they are read."""


def shape(config: HFConfig) -> Shape:
    """The opposite of mone_folder.config_of; what only training needs stays at its default."""
    config.unless("attention_output_bias", False, "the attention's output has no bias here")
    config.number("rms_norm_eps")  # whose default is not that of other families
    layers = config.size("num_hidden_layers")
    dense = _dense(config, layers)
    shared = config.count("shared_expert_intermediate_size")
    routed = experts(config, width="moe_intermediate_size", dense=dense, shared=shared)
    if config.truth("shared_expert_gate", False):
        routed["moe_shared_expert_gate"] = True
    found = decoder(config) | _attention(config) | routed | _router(config)
    size = config.size("head_dim", config.size("hidden_size") // config.size("num_attention_heads"))
    found |= _choice(config, layers, dense) | multipliers(config, attention=size**-0.5)
    return found | embeddings(config)


def _dense(config: HFConfig, layers: int) -> list[int]:
    kinds = config.words("mlp_layer_types", ["sparse"] * layers)
    if len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}:
        raise ValueError(
            f"{config.path}: mlp_layer_types must be dense or sparse for each of {layers} layers"
        )
    return [n for n, kind in enumerate(kinds) if kind == "dense"]


def _attention(config: HFConfig) -> Shape:
    norm, whole = config.truth("qk_norm", False), config.truth("qk_norm_all_heads", False)
    if not config.has("kv_lora_rank"):
        return grouped_attention(config, qk_norm=norm, all_heads=whole)
    found = latent_attention(config)
    return found if norm else {n: value for n, value in found.items() if n != "qk_layernorm"}


def _router(config: HFConfig) -> Shape:
    found: Shape = {}
    if config.has("n_group"):
        found["moe_router_num_groups"] = config.size("n_group")
        found["moe_router_group_topk"] = config.size("topk_group")
    if config.word("router_score_function", "softmax") == "sigmoid":
        found["moe_router_score_function"] = "sigmoid"
    if config.truth("router_expert_bias", False):
        found["moe_router_enable_expert_bias"] = True
    found |= softmax_router(config, normalised=not config.truth("router_pre_softmax", False))
    dtype = config.word("router_dtype", "float32")
    found["moe_router_dtype"] = _DTYPES.get(dtype, dtype)
    if config.null("router_dtype"):
        del found["moe_router_dtype"]
    return found | topk_scale(config)


def _choice(config: HFConfig, layers: int, dense: list[int]) -> Shape:
    """Which neurons an expert keeps."""
    found: dict[str, Any] = {n: read(config, n) for n, read in _CHOICE.items() if config.has(n)}
    if not {"mone_neuron_ratio", "mone_neurons_per_token"} & set(found):
        found["mone_neuron_ratio"] = 0.25
    if config.truth("mone_selection_bias", False):
        found["mone_ng_loss_type"] = "bias"
    if config.has("mone_layers"):
        choosing = config.layers("mone_layers", layers)
        if set(choosing) != set(range(layers)) - set(dense):
            found["mone_layer_freq"] = layer_pattern([int(n in choosing) for n in range(layers)])
    return found


class QueryNorm(Pair):
    """Of q, or with latent attention of what q is made of: one tensor in Megatron."""

    def views(self, ours: "Tensor", sizes: Sizes) -> list[View]:
        """See Pair.views."""
        return [(self.theirs[sizes.latent], ours, tuple(ours.shape))]


_QUERY_NORM = QueryNorm(
    "self_attention.q_layernorm.weight",
    *(f"{LAYER}self_attn.{name}.weight" for name in ("q_norm", "q_a_layernorm")),
)
PAIRS = (
    *ENDS, *NORMS, *mlp(), *BIASED_ROUTER, *SHARED_EXPERTS, *ATTENTION, *LATENT_ATTENTION,
    _QUERY_NORM,  # in the place of either attention's: the last of a name counts
    Pair("mlp.router.weight", LAYER + "mlp.gate.weight"),
    FusedExperts("mlp.experts.linear_fc1", LAYER + "mlp.experts.gate_up_proj"),
    FusedExperts("mlp.experts.linear_fc2", LAYER + "mlp.experts.down_proj"),
    Pair("mlp.experts.neuron_bias", LAYER + "mlp.experts.neuron_bias"),
    Pair("mlp.shared_experts.gate_weight", LAYER + "mlp.shared_expert_gate.weight"),
)  # fmt: skip
FAMILY = Family("MoNE", ("mone",), shape, PAIRS)
