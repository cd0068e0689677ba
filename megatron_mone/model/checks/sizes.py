"""Numbers that Megatron takes, and divides by, loops over or gives to torch later on.

Touches nothing.
"""

import math
from argparse import Namespace
from collections.abc import Callable

_RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "1 or more",
        lambda value: value >= 1,
        (
            *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups"),
            *("kv_channels", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_router_topk"),
            *("moe_shared_expert_intermediate_size", "seq_length", "max_position_embeddings"),
            *("vocab_size", "make_vocab_size_divisible_by", "micro_batch_size"),
            *("global_batch_size", "eval_micro_batch_size", "eval_global_batch_size"),
            *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
            *("context_parallel_size", "expert_model_parallel_size"),
            *("expert_tensor_parallel_size", "num_layers_per_virtual_pipeline_stage"),
            *("num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers"),
            *("decoder_last_pipeline_num_layers", "num_distributed_optimizer_instances"),
            *("train_iters", "train_samples", "lr_decay_iters", "lr_decay_samples"),
            *("lr_wsd_decay_iters", "lr_wsd_decay_samples", "eval_interval", "log_interval"),
            *("tensorboard_log_interval", "tensorboard_queue_size", "save_interval"),
            *("save_retain_interval", "non_persistent_save_interval", "log_memory_interval"),
            *("num_dataset_builder_threads", "distributed_timeout_minutes", "seed"),
            *("recompute_num_layers", "check_weight_hash_across_dp_replicas_interval"),
        ),
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        (
            *("num_experts", "mtp_num_layers", "lr", "min_lr", "lr_warmup_init"),
            *("lr_warmup_iters", "lr_warmup_samples", "weight_decay", "start_weight_decay"),
            *("end_weight_decay", "eval_iters", "num_workers", "init_method_std"),
            *("layernorm_epsilon", "adam_eps", "clip_grad", "exit_interval"),
        ),
    ),
    (
        "0 to 1",
        lambda value: 0 <= value <= 1,
        ("attention_dropout", "hidden_dropout", "rotary_percent"),
    ),
    (
        "0 or more and below 1",
        lambda value: 0 <= value < 1,
        ("adam_beta1", "adam_beta2", "lr_warmup_fraction"),
    ),
    ("above 0", lambda value: value > 0, ("rotary_base",)),
)


def check_sizes(args: Namespace) -> None:
    """Every number in its range.

    Args:
        args: parsed; what was not given is None, or Megatron's default, which fits.

    Raises:
        ValueError: one is not.
    """
    for allowed, fits, names in _RULES:
        for name in names:
            value = getattr(args, name, None)
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if not (math.isfinite(value) and fits(value)):
                raise ValueError(f"{name} = {value} is not allowed: it must be {allowed}")
