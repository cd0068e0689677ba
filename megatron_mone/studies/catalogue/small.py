"""The small model that studies train on CPU cores: two layers of eight experts, on Shakespeare."""

from typing import Any

CPU_STEPS, TINY_STEPS = 240, 4
WIDTH, EXPERTS, TOPK = 256, 8, 2

MONE: dict[str, Any] = {
    "mone_neuron_ratio": 0.25,
    "mone_activation": "silu",
    "mone_selection": "topk",
    "mone_neuron_block": 1,
    "mone_ng_loss_type": "selected",
    "mone_ng_loss_scope": "micro_batch",
    "mone_ng_loss_coeff": 0.1,
}
"""What studies vary stands here with its default: then a run is the same in two of them."""
MODEL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": WIDTH,
    "num_experts": EXPERTS, "moe_router_topk": TOPK, "moe_ffn_hidden_size": WIDTH,
    "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall", "moe_router_dtype": "fp32",
    **MONE,
    "swiglu": True, "add_bias_linear": False, "normalization": "RMSNorm",
    "position_embedding_type": "rope", "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "untie_embeddings_and_output_weights": True, "init_method_std": 0.06,
    "seq_length": 128, "max_position_embeddings": 128,
}  # fmt: skip
_CPU: dict[str, Any] = {
    "distributed_backend": "gloo", "transformer_impl": "local",
    "gradient_accumulation_fusion": False, "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False, "masked_softmax_fusion": False, "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False, "no_persist_layer_norm": True,
    "use_precision_aware_optimizer": False,
}  # fmt: skip


def training(steps: int) -> dict[str, Any]:
    """Arguments of a run of so many steps of 2,048 tokens."""
    return {
        **MODEL, **_CPU,
        "micro_batch_size": 16, "global_batch_size": 16, "train_iters": steps,
        "lr": 3.0e-3, "min_lr": 3.0e-4, "lr_decay_style": "cosine",
        "lr_warmup_iters": max(1, steps // 10), "weight_decay": 0.1, "adam_beta2": 0.95,
        "clip_grad": 1.0, "split": "950,50,0", "eval_interval": max(1, steps // 3),
        "eval_iters": min(16, steps), "log_interval": max(1, steps // 12),
        "tensorboard_log_interval": 1, "log_timers_to_tensorboard": True,
        "log_memory_to_tensorboard": True, "log_throughput": True, "ckpt_format": "torch_dist",
        "save_interval": steps, "tokenizer_type": "HuggingFaceTokenizer",
        "create_attention_mask_in_dataloader": True, "num_workers": 0,
    }  # fmt: skip
