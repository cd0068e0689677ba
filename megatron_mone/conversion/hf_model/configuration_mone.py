"""The config.json of a MoNE model: what its fields mean, and every check on their values.

This file is copied into exported folders, beside modeling_mone.py, and imports nothing of the
package it comes from. A wrong value is one ValueError that names the field.
"""

import math
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

ACTIVATIONS = ("silu", "sigmoid", "softmax", "gelu", "relu", "squared_relu")
SELECTIONS = ("topk", "threshold")
SCORE_FUNCTIONS = ("softmax", "sigmoid")
ROUTER_DTYPES = ("float32", "float64", None)
LAYER_TYPES = ("dense", "sparse")
LATENT = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    *("mone_neuron_groups", "mone_neuron_block"),
)
_OPTIONAL_SIZES = (
    *("kv_lora_rank", "q_lora_rank", *LATENT, "shared_expert_intermediate_size"),
    *("n_group", "topk_group", "mone_neurons_per_token"),
    *("mone_min_neurons_per_token", "mone_max_neurons_per_token"),
)
_FLAGS = (
    *("attention_bias", "attention_output_bias", "qk_norm", "qk_norm_all_heads"),
    *("shared_expert_gate", "router_pre_softmax", "router_expert_bias", "mone_selection_bias"),
    "tie_word_embeddings",
)
_NUMBERS = (
    *("rms_norm_eps", "routed_scaling_factor", "mone_threshold", "initializer_range"),
    *("embedding_multiplier", "residual_multiplier", "logits_scaling"),
)
# What rope_parameters hold of each kind that scales.
_SCALES = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
# Fields of other models that would change a number: the values that change none.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "sliding_window": (None,), "use_sliding_window": (None, False),
    "layer_types": (None,), "mlp_bias": (None, False), "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,), "num_nextn_predict_layers": (None, 0),
    "norm_topk_prob": (None,), "first_k_dense_replace": (None,), "n_shared_experts": (None,),
    "decoder_sparse_step": (None,), "mlp_only_layers": (None,), "swiglu_limit": (None,),
}  # fmt: skip


class MoNEConfig(PreTrainedConfig):
    """A decoder of RMSNorm, rotary attention and SwiGLU, with experts that choose their neurons.

    Symbols: F neurons of one expert (`moe_intermediate_size`), S of them kept for a routed token.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            head_dim, max_position_embeddings, rms_norm_eps, tie_word_embeddings, initializer_range,
            attention_dropout, use_cache: as in other models; the vocabulary has no padding.
        intermediate_size: neurons of a dense layer.
        rope_parameters: rope_theta; rope_type default, llama3 or, with latent attention, yarn;
            partial_rotary_factor.
        attention_bias, attention_output_bias: of q, k and v; of the output.
        qk_norm, qk_norm_all_heads: q and k are normalised, by head or over all heads at once; with
            latent attention, the latents are.
        embedding_multiplier, residual_multiplier: of embeddings, and of what attention and MLP add
            to the residual stream, as in Granite.
        attention_multiplier: of the scores (None: one over the root of head_dim).
        logits_scaling: what logits are divided by.
        kv_lora_rank: turns on DeepSeek's latent attention, with qk_nope_head_dim, qk_rope_head_dim,
            v_head_dim and q_lora_rank (None: q is projected at once).
        mlp_layer_types: "dense" or "sparse" (experts) for each layer; None: all sparse.
        moe_intermediate_size, num_experts, num_experts_per_tok: F, E and the experts of a token.
        shared_expert_intermediate_size, shared_expert_gate: of the expert that all tokens pass
            (None: there is none), and whether a sigmoid of its own weighs it.
        router_score_function: softmax, or sigmoid, whose chosen scores are divided by their sum.
        router_pre_softmax: softmax over all experts before the choice, not over the chosen.
        router_dtype: float32, float64, or None for the model's.
        router_expert_bias: a bias chooses the experts (`e_score_correction_bias`); sigmoid only.
        routed_scaling_factor: what the chosen probabilities are multiplied by.
        n_group, topk_group: groups of experts, and how many of them a token may use.
        mone_neuron_ratio, mone_neurons_per_token: S / F, or S; without either, S / F is 1/4.
        mone_activation: of the gate: silu, sigmoid, softmax (over F), gelu, relu or squared_relu.
        mone_selection: topk keeps S; threshold keeps gates of at least mone_threshold times the
            largest, from mone_min_neurons_per_token to mone_max_neurons_per_token.
        mone_neuron_groups, mone_neuron_block: groups that each keep their share; neurons that are
            kept or left together.
        mone_selection_bias: a bias is added to |gate| for choosing only (`experts.neuron_bias`).
        mone_layers: numbers of the sparse layers that choose neurons, from 0; None: all. The others
            keep every neuron, with silu.

    Raises:
        ValueError: one line that names a field that the model cannot compute.
    """

    model_type = "mone"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: bool = False
    qk_norm_all_heads: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    mlp_layer_types: list[str] | None = None
    moe_intermediate_size: int = 1024
    num_experts: int = 8
    num_experts_per_tok: int = 2
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    router_score_function: str = "softmax"
    router_pre_softmax: bool = False
    router_dtype: str | None = "float32"
    router_expert_bias: bool = False
    routed_scaling_factor: float = 1.0
    n_group: int | None = None
    topk_group: int | None = None
    mone_neuron_ratio: float | None = None
    mone_neurons_per_token: int | None = None
    mone_activation: str = "silu"
    mone_selection: str = "topk"
    mone_threshold: float = 0.1
    mone_min_neurons_per_token: int | None = None
    mone_max_neurons_per_token: int | None = None
    mone_neuron_groups: int = 1
    mone_neuron_block: int = 1
    mone_selection_bias: bool = False
    mone_layers: list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mone_neuron_ratio is None and self.mone_neurons_per_token is None:
            self.mone_neuron_ratio = 0.25
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.kv_lora_rank is not None and self.qk_rope_head_dim is not None:
            self.head_dim = self.qk_rope_head_dim  # what rotary embeddings go by
        if (
            self.head_dim is None
            and _is_size(self.hidden_size)
            and _is_size(self.num_attention_heads)
        ):
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mlp_layer_types is None and _is_size(self.num_hidden_layers):
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self._check()

    @property
    def kept(self) -> int:
        """S, neurons of an expert kept for a routed token."""
        if self.mone_neurons_per_token is not None:
            return self.mone_neurons_per_token
        assert self.mone_neuron_ratio is not None
        return round(self.mone_neuron_ratio * self.moe_intermediate_size)

    @property
    def selection_bounds(self) -> tuple[int, int]:
        """Fewest and most neurons kept for a routed token; both S for topk."""
        if self.mone_selection == "topk":
            return self.kept, self.kept
        low, high = self.mone_min_neurons_per_token, self.mone_max_neurons_per_token
        low = self.mone_neuron_groups * self.mone_neuron_block if low is None else low
        return low, self.kept if high is None else high

    @property
    def choosing_layers(self) -> list[int]:
        """Numbers of the layers whose experts choose neurons."""
        kinds = self.mlp_layer_types or []
        sparse = [layer for layer, kind in enumerate(kinds) if kind == "sparse"]
        return sparse if self.mone_layers is None else self.mone_layers

    def _check(self) -> None:
        for name, plain in _PLAIN.items():
            value = getattr(self, name, None)
            self._need(value in plain, name, f"{plain[0]!r}, or left out: this model has no other")
        for name in _SIZES:
            self._need(_is_size(getattr(self, name)), name, "a whole number of 1 or more")
        for name in _OPTIONAL_SIZES:
            value = getattr(self, name)
            self._need(value is None or _is_size(value), name, "null or a whole number from 1")
        for name in _FLAGS:
            self._need(isinstance(getattr(self, name), bool), name, "true or false")
        for name in _NUMBERS:
            self._need(_is_number(getattr(self, name)), name, "a number above 0")
        self._check_attention()
        self._check_layers()
        self._check_router()
        self._check_selection()

    def _check_attention(self) -> None:
        rope = self.rope_parameters
        self._need(isinstance(rope, dict), "rope_parameters", "an object")
        assert rope is not None
        latent = self.kv_lora_rank is not None
        kinds = ("default", "yarn") if latent else ("default", "llama3")
        kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta")
        share = rope.get("partial_rotary_factor", 1.0)
        for name in _SCALES.get(kind, ()) if isinstance(kind, str) else ():
            value = rope.get(name)
            self._need(_is_number(value), f"rope_parameters.{name}", "a number above 0", value)
        where = " with latent attention" if latent else ""
        self._need(kind in kinds, "rope_parameters.rope_type", f"{' or '.join(kinds)}{where}", kind)
        self._need(_is_number(theta), "rope_parameters.rope_theta", "a number above 0", theta)
        self._need(
            _is_number(share) and share <= 1 and (share == 1 or not latent),
            "rope_parameters.partial_rotary_factor", f"above 0 and at most 1{where}", share,
        )  # fmt: skip
        turned = int(self.head_dim * share)  # type: ignore[operator]
        self._need(turned % 2 == 0, "head_dim", "such that an even number of elements is rotated")
        dropout = self.attention_dropout
        self._need(
            dropout == 0 or (_is_number(dropout) and dropout < 1), "attention_dropout",
            "0 or more, below 1",
        )  # fmt: skip
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        self._need(heads % groups == 0, "num_key_value_heads", f"a divisor of the {heads} heads")  # type: ignore[operator]
        for name in LATENT:
            value = getattr(self, name)
            self._need(
                (value is not None) == latent, name, "given with kv_lora_rank, and only then"
            )
        self._need(latent or self.q_lora_rank is None, "q_lora_rank", "null without kv_lora_rank")
        scale = self.attention_multiplier
        self._need(
            scale is None or (_is_number(scale) and not latent), "attention_multiplier",
            "null with kv_lora_rank, or a number above 0",
        )  # fmt: skip
        self._need(
            not self.qk_norm_all_heads or (self.qk_norm and not latent), "qk_norm_all_heads",
            "false without qk_norm, and with kv_lora_rank",
        )  # fmt: skip
        self._need(
            not latent or not (self.attention_bias or self.attention_output_bias),
            "attention_bias", "false with kv_lora_rank: latent attention has no biases",
        )  # fmt: skip
        self._need(
            not latent or groups == heads,
            "num_key_value_heads", f"{heads} with kv_lora_rank: every head has its keys",
        )  # fmt: skip

    def _check_layers(self) -> None:
        kinds, layers = self.mlp_layer_types, self.num_hidden_layers
        fits = isinstance(kinds, list) and len(kinds) == layers
        self._need(
            fits and all(kind in LAYER_TYPES for kind in kinds or ()),
            "mlp_layer_types", f"{' or '.join(LAYER_TYPES)} for each of the {layers} layers",
        )  # fmt: skip
        assert kinds is not None
        chosen = self.mone_layers
        sparse = [layer for layer, kind in enumerate(kinds) if kind == "sparse"]
        self._need(
            chosen is None
            or (isinstance(chosen, list) and all(type(n) is int and n in sparse for n in chosen)),
            "mone_layers", "null or a list of the numbers of sparse layers",
        )  # fmt: skip

    def _check_router(self) -> None:
        experts, chosen, shared = (
            self.num_experts,
            self.num_experts_per_tok,
            self.shared_expert_gate,
        )
        self._need(chosen <= experts, "num_experts_per_tok", f"at most num_experts = {experts}")
        score, groups, used = self.router_score_function, self.n_group, self.topk_group
        self._choice("router_score_function", SCORE_FUNCTIONS)
        self._choice("router_dtype", ROUTER_DTYPES)
        self._need(
            score == "softmax" or not self.router_pre_softmax, "router_pre_softmax",
            "false with router_score_function = sigmoid, whose scores come before the choice",
        )  # fmt: skip
        self._need(
            score == "sigmoid" or not self.router_expert_bias, "router_expert_bias",
            "false with router_score_function = softmax",
        )  # fmt: skip
        self._need(
            not shared or self.shared_expert_intermediate_size is not None, "shared_expert_gate",
            "false without shared_expert_intermediate_size",
        )  # fmt: skip
        self._need((groups is None) == (used is None), "topk_group", "given with n_group")
        if groups is None or used is None:
            return
        self._need(experts % groups == 0, "n_group", f"a divisor of num_experts = {experts}")
        self._need(
            used <= min(groups, chosen) and chosen <= used * (experts // groups), "topk_group",
            f"such that {chosen} experts can be chosen from so many of the {groups} groups",
        )  # fmt: skip

    def _check_selection(self) -> None:
        ratio, given = self.mone_neuron_ratio, self.mone_neurons_per_token
        width, groups, block = (
            self.moe_intermediate_size, self.mone_neuron_groups, self.mone_neuron_block,
        )  # fmt: skip
        self._choice("mone_activation", ACTIVATIONS)
        self._choice("mone_selection", SELECTIONS)
        self._need(
            ratio is None or given is None, "mone_neuron_ratio",
            f"left out beside mone_neurons_per_token = {given}",
        )  # fmt: skip
        self._need(
            ratio is None or (_is_number(ratio) and ratio <= 1 and _is_whole(ratio * width)),
            "mone_neuron_ratio", f"above 0, at most 1, and a whole number of the {width} neurons",
        )  # fmt: skip
        self._need(self.kept <= width, "mone_neurons_per_token", f"at most the {width} neurons")
        self._need(self.mone_threshold <= 1, "mone_threshold", "above 0 and at most 1")
        self._need(
            width % (groups * block) == 0, "mone_neuron_block",
            f"such that {groups} groups of whole blocks make the {width} neurons",
        )  # fmt: skip
        low, high = self.selection_bounds
        names = ("mone_min_neurons_per_token", "mone_max_neurons_per_token")
        if self.mone_selection == "topk":
            for name in names:
                self._need(getattr(self, name) is None, name, "null with mone_selection = topk")
        for name, value in (("the kept neurons", self.kept), *zip(names, (low, high), strict=True)):
            self._need(
                0 < value <= width and value % (groups * block) == 0, name,
                f"a multiple of mone_neuron_groups * mone_neuron_block = {groups * block} from 1 "
                f"to {width}", value,
            )  # fmt: skip
        self._need(low <= high, names[0], f"at most {high}, the upper bound", low)

    def _choice(self, name: str, choices: tuple[Any, ...]) -> None:
        words = ", ".join("null" if choice is None else choice for choice in choices)
        self._need(getattr(self, name) in choices, name, f"one of {words}")

    def _need(self, met: bool, name: str, allowed: str, *value: Any) -> None:
        if not met:
            found = value[0] if value else getattr(self, name)
            text = " ".join(repr(found).split())[:80]
            raise ValueError(f"{name} = {text} is not allowed: it must be {allowed}")


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _is_whole(value: float) -> bool:
    return round(value) >= 1 and abs(value - round(value)) < 1e-6 * value
