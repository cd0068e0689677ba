"""The models that studies train on GPUs: presets that a study takes beside those of small.py.

The two sizes of the paper with its tokens, by stand-ins of configs/model; one of 0.2B for a single
GPU; and 30B. Layouts are such that the planner says they fit an H100 of 80 GB. Nothing here was run
on a GPU yet.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mone.model.run_config import read_part
from megatron_mone.studies.catalogue import small
from megatron_mone.studies.study import Preset

VOCABULARY = 32_000
"""Rows of the embedding that costs are planned with, where the tokenizer is not at hand."""
LIMITS = (
    "Equal tokens, not equal time or equal operations: cells differ in both.",
    "One learning rate for all cells, chosen for none of them.",
    "What the study measures of checkpoints at small sizes is not measured at this one.",
)
"""What results of these sizes do not say."""
_GPU = read_part(Path("studies"), "cluster", "gpu")
_BASE: dict[str, Any] = {
    **{name: small.MODEL[name] for name in (
        "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_token_dispatcher_type",
        "moe_router_dtype", "swiglu", "add_bias_linear", "normalization", "position_embedding_type",
        "attention_dropout", "hidden_dropout", "untie_embeddings_and_output_weights",
    )},
}  # fmt: skip
_SINGLE: dict[str, Any] = {
    **_BASE, "num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "kv_channels": 64,
    "ffn_hidden_size": 384, "num_experts": 32, "moe_router_topk": 4, "moe_ffn_hidden_size": 384,
    "init_method_std": 0.02, "max_position_embeddings": 4096,
}  # fmt: skip
"""0.2B parameters."""


def _model(name: str) -> dict[str, Any]:
    """A model of configs/model; its vocabulary is that of the tokenizer that is given."""
    values = read_part(Path("studies"), "model", name)
    return {**_BASE, **{key: value for key, value in values.items() if key != "vocab_size"}}


def _preset(
    model: dict[str, Any], gpus: int, *, tokens: float, sequences: int, length: int, micro: int,
    lr: float, layout: dict[str, Any] | None = None,
) -> Preset:  # fmt: skip
    """A preset of runs on so many tokens, in steps of `sequences` of `length`."""
    steps = round(tokens / (sequences * length))
    values = {
        **model, **small.MONE, **_GPU, **(layout or {}), "bf16": True,
        "seq_length": length, "micro_batch_size": micro, "global_batch_size": sequences,
        "train_iters": steps, "lr": lr, "min_lr": lr / 10, "lr_decay_style": "cosine",
        "lr_warmup_iters": max(1, steps // 50), "weight_decay": 0.1, "adam_beta2": 0.95,
        "clip_grad": 1.0, "split": "998,2,0", "eval_interval": steps // 10, "eval_iters": 20,
        "log_interval": max(1, steps // 400), "save_interval": steps // 20,
        "tensorboard_log_interval": 10, "ckpt_format": "torch_dist",
        "tokenizer_type": "HuggingFaceTokenizer", "create_attention_mask_in_dataloader": False,
        "num_workers": 2,
    }  # fmt: skip
    return Preset(values, gpus=gpus, limits=LIMITS)


PRESETS = {
    "1gpu": _preset(_SINGLE, 1, tokens=2e9, sequences=128, length=2048, micro=16, lr=6e-4),
    "cluster": _preset(
        _model("paper-0.9b"), 8, tokens=50e9, sequences=256, length=4096, micro=8, lr=4e-4
    ),
    "cluster-2.8b": _preset(
        _model("paper-2.8b"), 32, tokens=100e9, sequences=512, length=4096, micro=4, lr=3e-4
    ),
}
"""Of every study of a grid."""
_LARGEST = _preset(
    _model("moe-30b-a3b"), 64, tokens=200e9, sequences=1024, length=4096, micro=1, lr=3e-4,
    layout={"expert_model_parallel_size": 8},
)  # fmt: skip


def largest(*only: str) -> dict[str, Preset]:
    """The preset of 30B parameters, of the cells named; two seeds."""
    return {"cluster-30b": replace(_LARGEST, seeds=2, only=only)}
