"""Flags of Megatron's parser that no part of a run from our entry reads: one line, not silence.

Megatron has one parser for all its scripts. What only another of them reads would be taken here and
do nothing. tests/unit/checks/test_flags.py looks for readers in Megatron's source, and fails where
a flag has none and is not named here. Touches nothing.
"""

from argparse import Namespace
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from megatron_mone.config_checks import is_mone

STOCK_SCRIPT = (
    "this entry has it not; Megatron-LM's own pretrain_gpt.py does, and trains MoNE with --spec "
    "megatron_mone.layer_spec mone_layer_spec and MONE_CONFIG"
)

_NOT_A_GPT = "it is of {}; this entry trains GPT models"
_NOWHERE = "Megatron 0.19 parses it and {}"

REFUSED: dict[str, str] = {
    STOCK_SCRIPT: ("sft fim_* hybrid_context_parallel max_seqlen_per_dp_cp_rank logits_load_*"),
    "ranks are not started again inside their processes here; `python -m launch` starts a job "
    "again from its last checkpoint": "inprocess_*",
    "reinforcement learning is Megatron-LM's train_rl.py, which its package does not hold": (
        "perform_rl_step rl_* grpo_* langrl_env_config refit_method"
    ),
    "it is of text generation; this entry trains": (
        "inference_[!r]* use_legacy_static_engine enable_chunked_prefill num_speculative_tokens "
        "mamba_inference_* "
        "decode_only_cuda_graphs offset_sampling_seed_by_dp_rank max_tokens_to_oom flash_decode "
        "nccl_all_reduce_for_prefill mlp_chunks_for_prefill "
        "moe_pad_experts_for_cuda_graph_inference"
    ),
    "hybrid_layer_pattern alone makes a hybrid model, multi-token prediction behind its /": (
        "hybrid_override_pattern mtp_hybrid_override_pattern is_hybrid_model"
    ),
    _NOT_A_GPT.format("vision models"): (
        "vision_* dino_* swin_backbone_type num_classes img_h img_w num_channels patch_dim "
        "iter_per_epoch classes_fraction data_per_class_fraction head_lr_mult mask_type mask_factor"
    ),
    _NOT_A_GPT.format("BERT, T5 and retrieval models"): (
        "bert_* biencoder_* ict_* retriever_* indexer_* output_bert_embeddings titles_data_path "
        "evidence_data_path block_data_path embedding_path query_in_block_prob use_one_sent_docs "
        "mask_prob short_seq_prob sample_rate vocab_extra_ids relative_attention_*"
    ),
    _NOWHERE.format("hands it to nothing; give --step-batch-size-schedule"): "rampup_batch_size",
    _NOWHERE.format("builds the same model without it"): (
        "openai_gelu onnx_safe apply_residual_connection_post_layernorm"
    ),
    _NOWHERE.format("reads it nowhere"): (
        "dist_ckpt_save_pre_mcore_014 enable_full_sharding_in_hsdp "
        "exit_signal_handler_for_dataloader"
    ),
}
"""Why they are refused and what to do -> names and patterns of names."""

OF_MAMBA = (
    "mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads",
    "use_mamba_mem_eff_path", "mamba_training_ssm_states_dtype",
)  # fmt: skip
"""Names that only Mamba layers read."""

NOT_OF_HYBRID = {
    "moe_layer_freq": "hybrid_layer_pattern names its layers of experts (E)",
    "qk_layernorm": "its attention layers have no norms of q and k",
    "qk_l2_norm": "its attention layers have no norms of q and k",
    "use_rope_scaling": "Megatron 0.19 hands it to GPT models alone",
    "heterogeneous_layers_config_path": "hybrid_layer_pattern says what each layer is",
    "heterogeneous_layers_config_encoded_json": "hybrid_layer_pattern says what each layer is",
}
"""Names that a hybrid model does not read -> why."""

MOOT: dict[str, str] = {
    "deprecated_use_mcore_models": "Megatron 0.19 has no other models",
    "use_flash_attn": "Megatron 0.19 reads --attention-backend instead",
}
"""Names -> why they change nothing; published scripts give them, so the run goes on with a line."""

MOOT_WITH_MONE: dict[str, str] = {
    "moe_grouped_gemm": "their kernels are grouped over experts always, see --mone-backend",
    "use_transformer_engine_op_fuser": "they have their own kernels, see --mone-backend",
    "use_te_activation_func": "theirs is mone_activation",
    "use_fused_weighted_squared_relu": "their activation is mone_activation",
}
"""Flags that stock experts read -> why MoNE's do not."""

ONLY_WITH: dict[str, str] = {
    "moe_paged_stash": "moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_*",
    "fine_grained_activation_offloading": (
        "offload_modules min_offloaded_tensor_size activation_offload_fraction "
        "delta_offload_bytes_across_pp_ranks delay_offload_until_cuda_graph "
        "fine_grained_offloading_max_inflight_offloads"
    ),
    "use_grouped_gemm_for_shared_expert": "moe_shared_expert_glu_interleave_size",
}
"""A switch -> names and patterns of names that Megatron reads where it is on."""


def check_flags(args: Namespace, defaults: Mapping[str, Any]) -> None:
    """No flag may be given that nothing reads.

    Args:
        args: Megatron's, parsed, before its checks change any.
        defaults: of its parser.

    Raises:
        ValueError: names the first such flag, its value and what to do.
    """
    given = [name for name, default in defaults.items() if getattr(args, name, default) != default]
    for name in given:
        if reason := refusal(name):
            raise ValueError(
                f"{name} = {getattr(args, name)!r} would have no effect: {reason}; leave it out"
            )
    for switch, names in ONLY_WITH.items():
        unread = [n for n in given if any(fnmatchcase(n, p) for p in names.split())]
        if unread and not getattr(args, switch, False):
            name = unread[0]
            raise ValueError(
                f"{name} = {getattr(args, name)!r} would have no effect without {switch}: give "
                f"--{switch.replace('_', '-')} too, or leave it out"
            )
    _check_hybrid(args, given)


def _check_hybrid(args: Namespace, given: list[str]) -> None:
    """What GPT models alone read, or hybrid ones."""
    pattern = args.hybrid_layer_pattern
    for name in given:
        if name in OF_MAMBA and "M" not in (pattern or ""):
            raise ValueError(
                f"{name} = {getattr(args, name)!r} would have no effect: it is of Mamba layers, M "
                f"in hybrid_layer_pattern = {pattern!r}; leave it out"
            )
        if pattern and name in NOT_OF_HYBRID:
            raise ValueError(
                f"{name} = {getattr(args, name)!r} would have no effect in a hybrid model: "
                f"{NOT_OF_HYBRID[name]}; leave it out"
            )


def refusal(name: str) -> str | None:
    """Why an argument may not be given; None: it may."""
    for reason, names in REFUSED.items():
        if any(fnmatchcase(name, pattern) for pattern in names.split()):
            return reason
    return None


def notices(args: Namespace) -> list[str]:
    """A line for each flag given that changes nothing, whatever its value.

    Args:
        args: Megatron's, validated.
    """
    lines = [
        f"{name} = True has no effect: {why}" for name, why in MOOT.items() if getattr(args, name)
    ]
    if args.recompute_modules and args.recompute_granularity != "selective":
        lines.append(
            f"recompute_modules = {args.recompute_modules} has no effect with "
            f"recompute_granularity = {args.recompute_granularity}: it is read with selective"
        )
    if not is_mone(args):
        return lines
    lines += [
        f"{name} = True has no effect on MoNE's experts: {why}"
        for name, why in MOOT_WITH_MONE.items() if getattr(args, name)
    ]  # fmt: skip
    if "moe_act" in (args.recompute_modules or ()):
        lines.append(
            "recompute_modules = moe_act changes nothing in MoNE's experts: they keep gate, up and "
            "index of each chosen neuron and make their product again in the backward pass always"
        )
    return lines
