"""The seam into Megatron's HybridModel: a hybrid stack whose MoE layers are MoNE.

Beside layer_spec.py, Megatron's own way from GPTModel: where a GPT layer is attention and an MLP, a
hybrid layer is one of them, and `hybrid_layer_pattern` says which (`E`: experts). May touch:
Megatron's hybrid stack, its spec and its model's config.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core.models.hybrid import hybrid_layer_specs
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import MoETransformerLayer
from megatron.training.models.hybrid import HybridModelConfig

from megatron_mone.config import layer_pattern
from megatron_mone.model.layer_spec import made_ours, prepare


class MoNEHybridLayer(MoETransformerLayer):
    """A hybrid model's layer of experts: MoNE where mone_layer_freq says so, stock elsewhere.

    Arguments are those of MoETransformerLayer; `layer_number` counts all layers of the pattern.
    """

    def __init__(
        self, config: Any, submodules: Any, layer_number: int = 1, **keywords: Any
    ) -> None:
        spec = ModuleSpec(module=MoETransformerLayer, submodules=submodules)
        spec = made_ours(config, spec, layer_pattern(config)[layer_number - 1])
        super().__init__(config, spec.submodules, layer_number, **keywords)


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
    return ModuleSpec(MoNEHybridStack, submodules=replace(stock.submodules, moe_layer=layer))


@dataclass(kw_only=True)
class MoNEHybridModelConfig(HybridModelConfig):
    """HybridModelConfig whose layers of experts are MoNE."""

    hybrid_stack_spec: Any = field(default_factory=mone_hybrid_spec)


def check_hybrid(config: Any) -> None:
    """What MoNE has in GPT models alone.

    Args:
        config: TransformerConfig with mone_* fields.

    Raises:
        ValueError: names the field, its value and what to do.
    """
    for wrong, name, why in (
        (config.mone_qk_norm_all_heads, "mone_qk_norm_all_heads", "attention layers of Megatron's "
         "hybrid stack have no norms of q and k: leave it out"),
        (config.mone_residual_multiplier != 1, "mone_residual_multiplier", "its Mamba layers add "
         "to the residual stream in a way of their own: leave it out"),
        (config.mtp_num_layers, "mtp_num_layers", "Megatron numbers the layers of an MTP pattern "
         "as the decoder's first, and their metrics would be mixed: leave out the part of "
         "hybrid_layer_pattern behind /"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(
                f"{name} = {getattr(config, name)!r} is not allowed with MoNE in a hybrid model: "
                f"{why}"
            )
