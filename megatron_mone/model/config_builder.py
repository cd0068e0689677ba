"""Megatron's arguments -> the GPTModelConfig that is trained, MoNE or stock. Touches nothing."""

import argparse
from typing import Any

from megatron_mone.model import failure


def build_model_config(args: argparse.Namespace, elsewhere: bool = False):
    """The GPTModelConfig of `args`: MoNE where a mone_* field turns it on, stock otherwise.

    Args:
        args: Megatron's, validated.
        elsewhere: another machine will run this: whether its backend runs is known there.

    Raises:
        ValueError: a mone_* field does not fit, or Megatron refuses the model.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_mone.config import MoNEConfig, MoNEMLAConfig
    from megatron_mone.config_checks import is_mone
    from megatron_mone.model.layer_spec import MoNEGPTModelConfig, check_packages

    check_packages(args, elsewhere)
    if args.num_experts is not None and args.moe_router_topk > args.num_experts:
        raise ValueError(
            f"moe_router_topk = {args.moe_router_topk} is not allowed: it must be 1 to "
            f"num_experts = {args.num_experts}"
        )
    try:
        if not is_mone(args):
            stock = _transformer_config(args, TransformerConfig)
            return _with_rope_scaling(gpt_config_from_args(args, stock), args)
        if args.multi_latent_attention:
            # With the flag on, Megatron's helper ignores config_class for its own MLA class.
            plain = argparse.Namespace(
                **{**vars(args), "multi_latent_attention": False, "rope_type": None}
            )
            transformer = _transformer_config(plain, MoNEMLAConfig)
            if args.rope_type is not None:
                transformer.rope_type = args.rope_type
        else:
            transformer = _transformer_config(args, MoNEConfig)
        config = gpt_config_from_args(args, transformer, MoNEGPTModelConfig)
        return _with_rope_scaling(config, args)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"Megatron refuses the model: {failure.words(error)}") from error


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


def _with_rope_scaling(config: Any, args: argparse.Namespace) -> Any:
    """gpt_config_from_args hands on use_rope_scaling alone, so that every factor would be 8."""
    config.rope_scaling_factor = args.rope_scaling_factor
    return config
