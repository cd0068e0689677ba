"""The one seam into Megatron's layer specs: stock specs with their MoE layers made MoNE.

May touch: Megatron's spec functions and GPT model builder. Works on the local and on the
Transformer-Engine specs alike, because only the MoE module inside a layer is replaced.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.models import gpt as megatron_gpt
from megatron.training.models.gpt import GPTModelConfig

from megatron_mone.checkpoint import choice
from megatron_mone.common.patch import install, wrapping
from megatron_mone.config import attach_fields_from_env, layer_pattern, neurons_per_token
from megatron_mone.model.qk_norm import with_all_heads_norms
from megatron_mone.model.residual import with_scaled_parts
from megatron_mone.model.step_flops import follow_training
from megatron_mone.moe import shard_checkpoint, stored_choice
from megatron_mone.moe.dispatch.flex import check_flex_packages
from megatron_mone.moe.experts import MoNEExperts, backend_of
from megatron_mone.moe.layer import MoNELayer
from megatron_mone.moe.metrics import install_tracker
from megatron_mone.moe.router import AfterTopKRouter


@dataclass
class MoNEBlockSubmodules(TransformerBlockSubmodules):
    """A decoder block that `mone_layer_spec` made; multi-token-prediction layers follow it."""


def mone_layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Decoder block spec of this pipeline stage, MoE layers made MoNE where mone_layer_freq says.

    Accepted by `GPTModelConfig.transformer_layer_spec` and by
    `--spec megatron_mone.layer_spec mone_layer_spec`. Layers for multi-token prediction become the
    kind of the last decoder layer, whichever script builds the model.

    Args:
        config: a GPTModelConfig, or its TransformerConfig. Without mone_* fields it gets them from
            the YAML named by MONE_CONFIG.
        vp_stage: virtual pipeline stage, None without interleaving.

    Raises:
        ValueError: a mone_* field does not fit the model.
    """
    transformer = getattr(config, "transformer", config)
    prepare(transformer)
    block = stock_block(transformer, vp_stage)
    whole = layer_pattern(transformer)
    pattern = [whole[i] for i in _stage_layers(transformer, vp_stage)]
    layers = [
        made_ours(transformer, spec, kind)
        for spec, kind in zip(block.layer_specs or (), pattern, strict=True)
    ]
    return MoNEBlockSubmodules(layer_specs=layers, layer_norm=block.layer_norm)


def prepare(transformer: Any) -> None:
    """What a model of MoNE layers needs of its process, before its layers are built; on every rank:
    stages without MoNE layers take part in the tracker's collectives.

    Args:
        transformer: TransformerConfig; without mone_* fields it gets them from MONE_CONFIG's YAML.

    Raises:
        ValueError: a mone_* field does not fit the model, or a package is missing.
    """
    if not hasattr(transformer, "mone_neuron_ratio"):
        attach_fields_from_env(transformer)
    check_packages(transformer)
    tracker = install_tracker()
    tracker.decoder_layers = transformer.num_layers
    tracker.predicting_layers = transformer.mtp_num_layers or 0
    follow_training(tracker, transformer)
    install((*PATCHES, *stored_choice.PATCHES, *shard_checkpoint.PATCHES, *choice.PATCHES))
    stored_choice.note_model(transformer)
    neurons_per_token(transformer)  # one of the two fields is set


def check_packages(config: Any, elsewhere: bool = False) -> None:
    """Transformer Engine layers and the flex dispatcher need packages, and Megatron fails deep
    inside without them; a backend chosen by name needs a compiler, packages or a CUDA device,
    `elsewhere` those of another machine.

    Raises:
        ValueError: the first of `package_faults`.
    """
    for fault in package_faults(config, elsewhere):
        raise ValueError(fault)


def package_faults(config: Any, elsewhere: bool = False) -> Iterator[str]:
    """A line for each field that asks for what is not here; arguments as `check_packages`."""
    for check in (check_flex_packages, *(() if elsewhere else (_check_backend,))):
        try:
            check(config)
        except ValueError as error:
            yield str(error)
    if config.transformer_impl == "transformer_engine" and not HAVE_TE:
        yield (
            "transformer_impl = 'transformer_engine' needs the package transformer-engine: "
            "pip install 'megatron-mone[te]' on a CUDA machine, or --transformer-impl local"
        )


def _check_backend(config: Any) -> None:
    if getattr(config, "mone_backend", "auto") != "auto":
        backend_of(config)


def stock_block(transformer: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's own decoder block spec of this pipeline stage, of its TransformerConfig."""
    return get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )


@dataclass(kw_only=True)
class MoNEGPTModelConfig(GPTModelConfig):
    """GPTModelConfig whose decoder and multi-token-prediction layers are MoNE."""

    transformer_layer_spec: Any = mone_layer_spec


_stock_mtp_block_spec = megatron_gpt.mtp_block_spec


def mtp_block_spec(
    config: GPTModelConfig, transformer_layer_spec: Any, vp_stage: int | None = None
) -> Any | None:
    """Megatron's function of that name; MoNE where the decoder block's spec is ours.

    Args:
        config: of the model.
        transformer_layer_spec: of its decoder.
        vp_stage: virtual pipeline stage, None without interleaving.
    """
    if not isinstance(transformer_layer_spec, MoNEBlockSubmodules):
        return _stock_mtp_block_spec(config, transformer_layer_spec, vp_stage=vp_stage)
    transformer = config.transformer
    if transformer.mtp_num_layers is None:
        return None
    use_te = transformer.transformer_impl == "transformer_engine"
    spec: ModuleSpec = get_gpt_decoder_layer_specs(  # type: ignore[index]
        transformer,
        use_transformer_engine=use_te,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )[-1]
    spec = made_ours(transformer, spec, layer_pattern(transformer)[-1])
    return get_gpt_mtp_block_spec(
        transformer, spec, use_transformer_engine=use_te, vp_stage=vp_stage
    )


PATCHES = (
    wrapping(
        "mtp-block-spec",
        "megatron.training.models.gpt: mtp_block_spec",
        lambda stock: mtp_block_spec,
        why="build_model asks it for stock decoder specs, with no argument to pass ours through",
        needed_while="mtp_spec = mtp_block_spec(self._model_config",
    ),
)


def made_ours(config: Any, spec: Any, kind: int) -> ModuleSpec:
    """A stock layer's spec made ours, of a kind of `layer_pattern`."""
    if config.mone_qk_norm_all_heads:
        spec = with_all_heads_norms(spec)
    if config.mone_residual_multiplier != 1:
        spec = with_scaled_parts(spec, config.mone_residual_multiplier)
    if config.mone_router_loss_probs == "after_topk" and is_moe(spec):
        spec = _with_moe(spec, router=AfterTopKRouter)
    if kind == 2:
        assert is_moe(spec), spec.submodules.mlp
        spec = with_experts(spec, MoNELayer, MoNEExperts)
    return spec


def is_moe(spec: Any) -> bool:
    """Whether a stock layer's spec has experts."""
    mlp = spec.submodules.mlp
    return isinstance(mlp, partial) and mlp.func is MoELayer


def with_experts(spec: Any, layer: Callable[..., Any], experts: Any) -> ModuleSpec:
    """A copy of an MoE layer's spec with another MoE layer class and other experts inside."""
    return _with_moe(spec, layer, experts=experts)


def _with_moe(spec: Any, layer: Callable[..., Any] | None = None, **parts: Any) -> ModuleSpec:
    keywords = spec.submodules.mlp.keywords
    submodules = replace(keywords["submodules"], **parts)
    mlp = partial(layer or spec.submodules.mlp.func, **{**keywords, "submodules": submodules})
    return replace(spec, submodules=replace(spec.submodules, mlp=mlp))


def _stage_layers(config: Any, vp_stage: int | None) -> list[int]:
    """0-based numbers of the decoder layers of this stage, as get_gpt_decoder_block_spec slices."""
    layout = config.pipeline_model_parallel_layout
    if isinstance(layout, PipelineParallelLayerLayout):
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))
