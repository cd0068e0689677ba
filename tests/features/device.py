"""Rows of what only GPUs have, or what training does not read."""

from tests.features.row import apart

ROWS = (
    apart(
        "tp_comm_* use_kitchen_attention kitchen_attention_backend attention_backend "
        "flash_attention_version fused_residual_rmsnorm symmetric_ar_type "
        "batch_invariant_mode cache_mla_latents",
        "kernels of attention and dense linears, of Transformer Engine",
    ),
    apart(
        "nccl_* use_sharp sharp_enabled_group high_priority_stream_groups flight_recorder_* "
        "disable_symmetric_registration create_all_gather_group "
        "pipeline_model_parallel_comm_backend distributed_backend use_ring_exchange_p2p",
        "of NCCL and its groups",
    ),
    apart("transformer_impl local_rank lazy_mpu_init fake_process_group disable_jit_fuser "
          "enable_experimental spec yaml_cfg config_logger_dir model_parallel_size "
          "clone_scatter_output_in_embedding mrope_section mtp_standalone",
          "of how a run is started"),
)  # fmt: skip
