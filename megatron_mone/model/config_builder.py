"""Megatron's arguments -> the config of the model to train, MoNE or stock. Touches nothing."""

import argparse
from typing import Any

from megatron_mone.model import failure


def build_model_config(args: argparse.Namespace, elsewhere: bool = False):
    """The GPTModelConfig of `args`, a HybridModelConfig where they have a hybrid_layer_pattern:
    MoNE where a mone_* field turns it on, stock otherwise.

    Args:
        args: Megatron's, validated.
        elsewhere: another machine will run this: whether its backend runs is known there.

    Raises:
        ValueError: a mone_* field does not fit, or Megatron refuses the model.
    """
    from megatron_mone.config_checks import is_mone
    from megatron_mone.model.layer_spec import check_packages

    check_packages(args, elsewhere)
    if args.num_experts is not None and args.moe_router_topk > args.num_experts:
        raise ValueError(
            f"moe_router_topk = {args.moe_router_topk} is not allowed: it must be 1 to "
            f"num_experts = {args.num_experts}"
        )
    build = _gpt if args.hybrid_layer_pattern is None else _hybrid
    try:
        return build(args, is_mone(args))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"Megatron refuses the model: {failure.words(error)}") from error


def _gpt(args: argparse.Namespace, mone: bool) -> Any:
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_mone.model.layer_spec import MoNEGPTModelConfig

    kind = MoNEGPTModelConfig if mone else GPTModelConfig
    config = gpt_config_from_args(args, _transformer(args, mone), kind)
    config.rope_scaling_factor = args.rope_scaling_factor  # or every factor would be 8
    return config


def _hybrid(args: argparse.Namespace, mone: bool) -> Any:
    from megatron.training.argument_utils import hybrid_config_from_args
    from megatron.training.models.hybrid import HybridModelConfig

    from megatron_mone.config_checks import hybrid_moe_layers
    from megatron_mone.model.hybrid_spec import MoNEHybridModelConfig, check_hybrid

    if not mone:
        return hybrid_config_from_args(args, _transformer(args, mone), HybridModelConfig)
    transformer = _transformer(
        args, mone, moe_layer_freq=hybrid_moe_layers(args.hybrid_layer_pattern)
    )
    check_hybrid(transformer, args.hybrid_layer_pattern.partition("/")[2].partition("/")[0])
    return hybrid_config_from_args(args, transformer, MoNEHybridModelConfig)


def _transformer(args: argparse.Namespace, mone: bool, **changed: Any) -> Any:
    """The TransformerConfig of the arguments, some of them changed."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mone.config import MoNEConfig, MoNEMLAConfig

    args = argparse.Namespace(**{**vars(args), **changed})
    if not (mone and args.multi_latent_attention):
        return _transformer_config(args, MoNEConfig if mone else TransformerConfig)
    # With the flag on, Megatron's helper ignores config_class for its own MLA class.
    plain = argparse.Namespace(**{**vars(args), "multi_latent_attention": False, "rope_type": None})
    transformer = _transformer_config(plain, MoNEMLAConfig)
    if args.rope_type is not None:
        transformer.rope_type = args.rope_type
    return transformer


def _transformer_config(args: argparse.Namespace, kind: type) -> Any:
    """The config of Megatron's helper, which hands Xavier's method to a field that is not there."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from torch.nn.init import xavier_uniform_

    plain = argparse.Namespace(**{**vars(args), "init_method_xavier_uniform": False})
    config = core_transformer_config_from_args(plain, kind)
    if args.init_method_xavier_uniform:
        config.init_method = config.output_layer_init_method = xavier_uniform_
        config.embedding_init_method = xavier_uniform_
    return config
