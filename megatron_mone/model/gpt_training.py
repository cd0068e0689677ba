"""What Megatron's training loop asks of a GPT run: datasets, a batch, a forward step, a loss.

The same for MoNE and stock models. May touch: Megatron's data utilities and model-parallel state.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_mone.common.phases import DATA, OTHER, enter
from megatron_mone.model.checks.files import read_sequences
from megatron_mone.model.loss_check import check_loss

_stragglers = StragglerDetector()  # one a process; it times nothing unless --log-straggler is given
BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
PACKED_KEYS = ("cu_seqlens", "max_seqlen")
"""Of documents that know nothing of each other: where they begin and end, and the longest."""


def forward_step(
    data_iterator: Iterator | None, model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """One micro-batch forward; Megatron's schedules call it.

    Args:
        data_iterator: of this rank; None where it reads no data.
        model: a chunk of the model, wrapped or not.
        return_schedule_plan: asked for by overlap_moe_expert_parallel_comm, whose schedule
            (combined_1f1b.py) runs a micro-batch's forward beside another's backward.

    Returns:
        The model's output (per-token losses on the last stage), or the plan that computes it, and
        the function that sums them.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    enter(DATA)
    with _stragglers(bdata=True):
        batch = get_batch(data_iterator, getattr(_unwrap(model), "vp_stage", None))
    enter(OTHER)
    timers("batch-generator").stop()
    forward: Any = model.build_schedule_plan if return_schedule_plan else model
    with _stragglers:
        output = forward(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            **_packing(batch),
        )
    loss_mask: Any = batch["loss_mask"]
    return output, partial(loss_func, loss_mask)


def _packing(batch: dict[str, Any]) -> dict[str, PackedSeqParams]:
    """What the model is told of a batch of packed documents; nothing of another."""
    if batch.get("cu_seqlens") is None:
        return {}
    bounds, longest = batch["cu_seqlens"][0], int(batch["max_seqlen"])
    update_seqlen_stats_from_cu_seqlens(bounds)  # attention's part in TFLOP/s
    return {
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            total_tokens=int(bounds[-1]),
            tokens_per_sample=get_args().seq_length,
        )
    }


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum per-token losses.

    Args:
        loss_mask: [b, s] 1 where a token counts.
        output: [b, s] negative log likelihoods in nats.

    Returns:
        Loss sum, number of tokens, and both for the log.

    Raises:
        RuntimeError: `check_loss` refuses the loss and may not run the step again.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output.reshape(-1).float() * mask)
    check_loss(loss)
    tokens = mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def get_batch(data_iterator: Iterator | None, vp_stage: int | None) -> dict[str, Tensor | None]:
    """Read a micro-batch on TP rank 0, share it over TP, and keep this CP rank's part.

    Returns:
        BATCH_KEYS -> [b, s / CP] tensors (attention mask [b, 1, s, s] or None); all None on a
        pipeline stage without embedding, loss and multi-token prediction. With
        --dataloader-inter-document-masking [1, b s], and on every stage PACKED_KEYS:
        cu_seqlens [1, documents + 1], max_seqlen [1].
    """
    args = get_args()
    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    mtp = _has_mtp(vp_stage)
    packed = args.dataloader_inter_document_masking
    keys = (*BATCH_KEYS, *PACKED_KEYS) if packed else BATCH_KEYS
    if not (first or last or mtp or packed):
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        data = next(data_iterator)
        batch = {k: data[k].cuda(non_blocking=True) if k in data else None for k in keys}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch = {k: batch.get(k) for k in keys}
    if packed:  # check_packing: CP 1
        return flatten_batch_for_packed_sequences(batch)
    return get_batch_on_this_cp_rank(batch, False, mpu.get_context_parallel_group())


def datasets_provider(samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """Training, validation and test datasets.

    Args:
        samples: wanted number of samples of each.
        vp_stage: unused; Megatron passes it with interleaved pipelines.
    """
    del vp_stage
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    config = dataset_config(args)
    if not args.full_validation:
        # --start-eval-at-iter may be past the end: the last evaluation needs as many as a test.
        samples = [0 if args.skip_train else samples[0], samples[1] or samples[2], samples[2]]
        _leave_out_unread(config, samples)
    return BlendedMegatronDatasetBuilder(kind, samples, _reads_data, config).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """What Megatron's arguments say of the datasets, as its pretrain_gpt.py reads them."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        object_storage_cache_path=args.object_storage_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=read_sequences(args),  # type: ignore[arg-type]
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        inter_document_masking=args.dataloader_inter_document_masking,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )


def _leave_out_unread(config: GPTDatasetConfig, samples: Sequence[int]) -> None:
    """Build no dataset of which no sample is wanted: Megatron's loader of a blend of none asserts
    (`no sample to consume`), and its builder looks for documents that a split may not have."""
    for part, wanted in enumerate(samples):
        if wanted == 0:
            blended = config.blend_per_split is not None and any(config.blend_per_split)
            parts: Any = config.blend_per_split if blended else config.split_matrix
            parts[part] = None


def _reads_data() -> bool:
    """Whether this rank feeds tokens or labels to its TP group."""
    stage = mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage() or _has_mtp()
    stage = stage or get_args().dataloader_inter_document_masking
    return stage and mpu.get_tensor_model_parallel_rank() == 0


def _has_mtp(vp_stage: int | None = None) -> bool:
    """Whether this rank, or one chunk of it, predicts further tokens: a layout may place that."""
    args = get_args()
    layout = args.pipeline_model_parallel_layout
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout(layout, args.pipeline_model_parallel_size)
    return mtp_on_this_rank(layout, args.mtp_num_layers, vp_stage is None, vp_stage)


def _unwrap(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model
