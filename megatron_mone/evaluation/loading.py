"""A checkpoint's weights in this rank's part of the model. Touches Megatron's global state."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mone.common.local_ranks import free_port
from megatron_mone.evaluation.arguments import evaluation_words
from megatron_mone.evaluation.tokens import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked: `chunks` of this rank, in evaluation mode."""

    args: Namespace
    chunks: list[Any]
    tokenizer: Tokenizer


def load(words: Sequence[str]) -> Loaded:
    """Start Megatron and load a checkpoint's weights. Collective over all ranks.

    Args:
        words: of `evaluation_words`.

    Raises:
        ValueError: one line: a wrong flag, layout, checkpoint or tokenizer.
    """
    if not torch.cuda.is_available():
        from megatron_mone import cpu_emulation

        cpu_emulation.install()
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    from megatron_mone.model import patches
    from megatron_mone.model.arguments import parse_arguments
    from megatron_mone.model.config_builder import build_model_config

    patches.install()
    args = parse_arguments(evaluation_words(words))
    if args.context_parallel_size > 1:
        raise ValueError(
            f"context_parallel_size = {args.context_parallel_size} is not evaluated: leave it out, "
            "a checkpoint loads in any layout"
        )
    args.exit_on_missing_checkpoint = True
    tokenizer = Tokenizer(args)
    if tokenizer.size > args.padded_vocab_size:
        raise ValueError(
            f"tokenizer_model = {args.tokenizer_model!r} has {tokenizer.size} ids, the embedding "
            f"of {args.load} {args.padded_vocab_size} rows: give the tokenizer it was trained with"
        )
    config = build_model_config(args)
    return Loaded(args, _build(args, config), tokenizer)


def _build(args: Namespace, config: Any) -> list[Any]:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import initialize, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_mone.checkpoint.verify import CheckpointRefusedError

    try:
        training.initialize_megatron()
        initialize.set_jit_fusion_options(args.tensor_model_parallel_size)
        chunks, _, _ = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            checkpointing_context={},
            cfg_container=pretrain_cfg_container_from_args(args, config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    except CheckpointingException as error:
        raise ValueError(f"checkpoint {args.load}: {error}") from error
    except CheckpointRefusedError as error:
        raise ValueError(str(error)) from error
    for chunk in chunks:
        chunk.eval()
    return chunks
