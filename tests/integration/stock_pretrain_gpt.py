"""A stock Megatron pretraining script, the least that Megatron-LM's own does.

Written for a GPU machine: it knows nothing of this project. `--record-losses FILE` appends one line
per micro-batch on the ranks that compute a loss: iteration, rank, and the loss sum in full.
"""

from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def needs_data():
    """Whether this pipeline stage embeds tokens or computes a loss."""
    return mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()


def get_batch(data_iterator, vp_stage=None):
    """Read a batch on TP rank 0, broadcast it over TP, keep this CP rank's part."""
    args = get_args()
    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    if not (first or last):
        return dict.fromkeys(KEYS)
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        data = next(data_iterator)
        batch = {k: data[k].cuda(non_blocking=True) if k in data else None for k in KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=bool(args.mtp_num_layers) and last,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch = {k: batch.get(k) for k in KEYS}
    return get_batch_on_this_cp_rank(batch, False, mpu.get_context_parallel_group())


def loss_func(loss_mask, output):
    """Return the loss summed over tokens, the number of tokens, and both to report."""
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    if args.record_losses:
        line = f"{args.curr_iteration} {torch.distributed.get_rank()} {loss.item()!r}\n"
        with Path(args.record_losses).open("a") as file:
            file.write(line)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator, model):
    """Run the model on the next batch."""
    batch = get_batch(data_iterator, getattr(model.module, "vp_stage", None))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def datasets_provider(samples, vp_stage=None):
    """Build the three synthetic datasets of `--mock-data`."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )

    def on_this_rank():
        return needs_data() and mpu.get_tensor_model_parallel_rank() == 0

    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, on_this_rank, config).build()


datasets_provider.is_distributed = True


def add_arguments(parser):
    """Add this script's own flag."""
    parser.add_argument("--record-losses", default=None)
    return parser


if __name__ == "__main__":
    arguments = parse_and_validate_args(extra_args_provider=add_arguments)
    container = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    pretrain(container, datasets_provider, ModelType.encoder_or_decoder, forward_step)
