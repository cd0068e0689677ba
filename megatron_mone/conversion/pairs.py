"""What a model's tensors are called here and elsewhere: a table of pairs, read in both directions.

A pair names one tensor of ours and those of a Hugging Face folder that lie in it, and says where:
as views of ours. Importing copies into the views, exporting copies out of them, so that one table
is both, and the shapes that a folder must have follow from ours. `{l}` is a layer's number, `{e}`
an expert's. A pair whose tensor a model has not is not used; a tensor without a pair is an error.

Ours, as Megatron's sharded state dict holds them on one rank: linear_fc1 of experts [E, 2, F, H],
gate first, linear_fc2 of experts [E, F, H], linear_qkv in groups of query heads, key, value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # a shape needs none

LAYER = "model.layers.{l}."  # of all families here

type View = tuple[str, Tensor, tuple[int, ...]]
"""Name elsewhere, the part of ours, and its shape there (of the same size)."""


@dataclass(frozen=True)
class Sizes:
    """What some pairs need to know of a model: query heads, groups of them, vocabulary rows, and
    whether its attention is latent."""

    heads: int
    groups: int
    vocabulary: int
    latent: bool


@dataclass(frozen=True)
class Pair:
    """One tensor for one, as it is.

    Attributes:
        ours: its name, without "decoder.layers.N." in a layer.
        theirs: names elsewhere.
    """

    ours: str
    theirs: tuple[str, ...]

    def __init__(self, ours: str, *theirs: str) -> None:
        object.__setattr__(self, "ours", ours)
        object.__setattr__(self, "theirs", theirs)

    def views(self, ours: Tensor, sizes: Sizes) -> list[View]:
        """The parts of `ours` that tensors elsewhere are."""
        return [(self.theirs[0], ours, tuple(ours.shape))]


class Vocabulary(Pair):
    """The rows that are no padding."""

    def views(self, ours: Tensor, sizes: Sizes) -> list[View]:
        """See Pair.views."""
        rows = ours[: sizes.vocabulary]
        return [(self.theirs[0], rows, tuple(rows.shape))]


class Rows(Pair):
    """Tensors of the same height above each other: gate and up of a dense MLP."""

    def views(self, ours: Tensor, sizes: Sizes) -> list[View]:
        """See Pair.views."""
        parts = ours.chunk(len(self.theirs))
        return [(n, part, tuple(part.shape)) for n, part in zip(self.theirs, parts, strict=True)]


class QKV(Pair):
    """q, k and v, weights or biases: a group's query heads in Megatron, then its key, its value."""

    def views(self, ours: Tensor, sizes: Sizes) -> list[View]:
        """See Pair.views."""
        per_group = sizes.heads // sizes.groups
        grouped = ours.view(sizes.groups, per_group + 2, -1, *ours.shape[1:])
        parts = grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1]
        shapes = [(part.numel() // max(1, ours[0].numel()), *ours.shape[1:]) for part in parts]
        return list(zip(self.theirs, parts, shapes, strict=True))


class Experts(Pair):
    """A tensor an expert and projection: gate and up, or down alone."""

    def views(self, ours: Tensor, sizes: Sizes) -> list[View]:
        """See Pair.views."""
        found: list[View] = []
        for e, expert in enumerate(ours):
            parts: Sequence[Tensor] = expert if len(self.theirs) > 1 else [expert.t()]
            for name, part in zip(self.theirs, parts, strict=True):
                found.append((name.replace("{e}", str(e)), part, tuple(part.shape)))
        return found


class FusedExperts(Pair):
    """A tensor for all experts: gate above up [E, 2F, H], or down [E, H, F]."""

    def views(self, ours: Tensor, sizes: Sizes) -> list[View]:
        """See Pair.views."""
        whole = ours.flatten(1, 2) if ours.dim() == 4 else ours.transpose(1, 2)
        return [(self.theirs[0], whole, tuple(whole.shape))]


ENDS = (
    Vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Pair("decoder.final_layernorm.weight", "model.norm.weight"),
    Vocabulary("output_layer.weight", "lm_head.weight"),
)
NORMS = (
    Pair("input_layernorm.weight", LAYER + "input_layernorm.weight"),
    Pair("pre_mlp_layernorm.weight", LAYER + "post_attention_layernorm.weight"),
)
_QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (
    QKV("self_attention.linear_qkv.weight", *(f"{LAYER}self_attn.{p}.weight" for p in _QKV)),
    QKV("self_attention.linear_qkv.bias", *(f"{LAYER}self_attn.{p}.bias" for p in _QKV)),
    Pair("self_attention.q_layernorm.weight", LAYER + "self_attn.q_norm.weight"),
    Pair("self_attention.k_layernorm.weight", LAYER + "self_attn.k_norm.weight"),
    Pair("self_attention.linear_proj.weight", LAYER + "self_attn.o_proj.weight"),
)
LATENT_ATTENTION = tuple(
    Pair(f"self_attention.{ours}.weight", f"{LAYER}self_attn.{theirs}.weight")
    for ours, theirs in (
        ("linear_q_proj", "q_proj"),
        ("linear_q_down_proj", "q_a_proj"),
        ("q_layernorm", "q_a_layernorm"),
        ("linear_q_up_proj", "q_b_proj"),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
        ("kv_layernorm", "kv_a_layernorm"),
        ("linear_kv_up_proj", "kv_b_proj"),
        ("linear_proj", "o_proj"),
    )
)


def mlp(ours: str = "mlp.", theirs: str = LAYER + "mlp.") -> tuple[Pair, ...]:
    """Gate, up and down of a dense MLP, or of a shared expert."""
    return (
        Rows(ours + "linear_fc1.weight", theirs + "gate_proj.weight", theirs + "up_proj.weight"),
        Pair(ours + "linear_fc2.weight", theirs + "down_proj.weight"),
    )


def routed(router: str, gate: str, up: str, down: str) -> tuple[Pair, ...]:
    """A router, and experts of a tensor each."""
    return (
        Pair("mlp.router.weight", LAYER + router),
        Experts("mlp.experts.linear_fc1", LAYER + gate, LAYER + up),
        Experts("mlp.experts.linear_fc2", LAYER + down),
    )


EXPERTS = routed(
    "mlp.gate.weight",
    *(f"mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up", "down")),
)
BIASED_ROUTER = (Pair("mlp.router.expert_bias", LAYER + "mlp.gate.e_score_correction_bias"),)
MORE_TOKENS = (
    Pair("mtp.enorm.weight", LAYER + "enorm.weight"),
    Pair("mtp.hnorm.weight", LAYER + "hnorm.weight"),
    Pair("mtp.eh_proj.weight", LAYER + "eh_proj.weight"),
    Pair("mtp.final_layernorm.weight", LAYER + "shared_head.norm.weight"),
)
MORE_TOKENS_COPIES = r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"
"""Of the model's own embedding and head, which Megatron's layer reads."""
SHARED_EXPERTS = mlp("mlp.shared_experts.", LAYER + "mlp.shared_experts.")
