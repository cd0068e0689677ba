"""The seam into Megatron's HybridModel: a hybrid stack whose MoE layers are MoNE.

Beside layer_spec.py, Megatron's own way from GPTModel: where a GPT layer is attention and an MLP, a
hybrid layer is one of them, and `hybrid_layer_pattern` says which (`E`: experts). May touch:
Megatron's hybrid stack, its spec and its model's config.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core.models.hybrid import hybrid_layer_specs
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import MoETransformerLayer
from megatron.training.models.hybrid import HybridModelConfig

from megatron_mone.config import layer_pattern
from megatron_mone.model.layer_spec import made_ours, prepare


class MoNEHybridLayer(MoETransformerLayer):
    """A hybrid model's layer of experts: MoNE where mone_layer_freq says so, stock elsewhere.

    Arguments are those of MoETransformerLayer; `layer_number` counts all layers of the pattern.

    Args:
        depth: of multi-token prediction, 1-based, whose experts are of the kind of the decoder's
            last, and are numbered behind it; None in the decoder.
    """

    def __init__(
        self, config: Any, submodules: Any, layer_number: int = 1, depth: int | None = None,
        **keywords: Any,
    ) -> None:  # fmt: skip
        kinds = layer_pattern(config)
        kind = kinds[layer_number - 1] if depth is None else last_kind(config)
        spec = ModuleSpec(module=MoETransformerLayer, submodules=submodules)
        spec = made_ours(config, spec, kind)
        super().__init__(
            config, spec.submodules, layer_number, is_mtp_layer=depth is not None, **keywords
        )
        if depth is not None:
            experts: Any = self.mlp
            experts.set_layer_number(depth)  # the layer keeps the number of its keys


class MoNEPredictionLayer(MultiTokenPredictionLayer):
    """One depth of multi-token prediction, whose layers of experts know which.

    Megatron tells a hybrid model's prediction layers nothing of it: their experts would be logged
    as the decoder's first. Arguments are those of MultiTokenPredictionLayer.
    """

    def __init__(
        self, config: Any, submodules: Any, layer_number: int = 1, *,
        hybrid_submodules: Any = None, **keywords: Any,
    ) -> None:  # fmt: skip
        check_hybrid(config, keywords.get("mtp_layer_pattern"))
        if hybrid_submodules is not None:
            moe = hybrid_submodules.moe_layer
            moe = replace(moe, params={**(moe.params or {}), "depth": layer_number})
            hybrid_submodules = replace(hybrid_submodules, moe_layer=moe)
        super().__init__(
            config, submodules, layer_number, hybrid_submodules=hybrid_submodules, **keywords
        )


class MoNEHybridStack(HybridStack):
    """Megatron's hybrid stack, of whose config the mone_* fields are read and checked first.

    Raises:
        ValueError: a mone_* field does not fit a hybrid model.
    """

    def __init__(self, config: Any, *arguments: Any, **keywords: Any) -> None:
        prepare(config)
        check_hybrid(config)
        super().__init__(config, *arguments, **keywords)


def mone_hybrid_spec() -> ModuleSpec:
    """Megatron's spec of a hybrid stack with its layers of experts made MoNE.

    For `HybridModelConfig.hybrid_stack_spec`; stock scripts name it `--spec
    megatron_mone.layer_spec mone_hybrid_spec`.
    """
    stock: Any = hybrid_layer_specs.hybrid_stack_spec
    layer = replace(stock.submodules.moe_layer, module=MoNEHybridLayer)
    block = stock.submodules.mtp_block_spec
    (predicts,) = block.submodules.layer_specs
    predicts = replace(predicts, module=MoNEPredictionLayer)
    block = replace(block, submodules=replace(block.submodules, layer_specs=[predicts]))
    parts = replace(stock.submodules, moe_layer=layer, mtp_block_spec=block)
    return ModuleSpec(MoNEHybridStack, submodules=parts)


@dataclass(kw_only=True)
class MoNEHybridModelConfig(HybridModelConfig):
    """HybridModelConfig whose layers of experts are MoNE."""

    hybrid_stack_spec: Any = field(default_factory=mone_hybrid_spec)


def last_kind(config: Any) -> int:
    """Of `layer_pattern`, the kind of the decoder's last layer of experts; 0 without one."""
    return next((kind for kind in reversed(layer_pattern(config)) if kind), 0)


def check_hybrid(config: Any, predicted: str | None = None) -> None:
    """What MoNE has in GPT models alone.

    Args:
        config: TransformerConfig with mone_* fields.
        predicted: the pattern of each depth of multi-token prediction, if there is any.

    Raises:
        ValueError: names the field, its value and what to do.
    """
    experts = (predicted or "").count("E")
    for wrong, name, why in (
        (config.mone_qk_norm_all_heads, "mone_qk_norm_all_heads", "attention layers of Megatron's "
         "hybrid stack have no norms of q and k: leave it out"),
        (config.mone_residual_multiplier != 1, "mone_residual_multiplier", "its Mamba layers add "
         "to the residual stream in a way of their own: leave it out"),
        (experts and config.mtp_use_repeated_layer, "mtp_use_repeated_layer", "Megatron counts the "
         "balance loss of a hybrid layer at each depth: leave it out"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(
                f"{name} = {getattr(config, name)!r} is not allowed with MoNE in a hybrid model: "
                f"{why}"
            )
    if experts > 1:
        raise ValueError(
            f"hybrid_layer_pattern behind / = {predicted!r} is not allowed with MoNE: metrics have "
            "one place for the experts of a depth of multi-token prediction: give it one E"
        )
