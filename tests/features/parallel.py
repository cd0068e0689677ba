"""Rows of parallelism: how ranks, layers, sequences and gradients are laid out and sent."""

from tests.features.row import Example, refused, trained, unrun

PARITY = "tests/parity/test_training_layouts.py::test_same_numbers_as_one_rank"
SHARDED = "--use-distributed-optimizer"
MANY_BUCKETS = "--ddp-bucket-size 2000"

ROWS = (
    trained(
        "tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size "
        "context_parallel_size expert_model_parallel_size expert_tensor_parallel_size",
        "50 layouts, alone and together: docs/PARITY.md",
        shown=PARITY,
    ),
    trained(
        "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank "
        "microbatch_group_size_per_vp_stage",
        "the interleaved schedule",
        Example(flags="--microbatch-group-size-per-virtual-pipeline-stage 4",
                beside="--num-layers 4", same=1e-6, layouts=("PP2 VPP2",), stock="PP2 VPP2"),
    ),
    trained(
        "overlap_p2p_comm overlap_p2p_comm_warmup_flush",
        "messages of the interleaved schedule beside its passes",
        Example(flags="--overlap-p2p-communication-warmup-flush", beside="--num-layers 4", same=0,
                layouts=("PP2 VPP2",), stock="PP2 VPP2"),
        Example(flags="--no-overlap-p2p-communication", beside="--num-layers 8", same=0,
                layouts=("PP4 VPP2",), stock="PP4 VPP2"),
    ),
    trained(
        "use_distributed_optimizer overlap_grad_reduce overlap_param_gather",
        "the optimizer's state, cut over data-parallel ranks; gradients and parameters sent beside "
        "the passes",
        Example(flags=f"{SHARDED} --overlap-grad-reduce --overlap-param-gather {MANY_BUCKETS}",
                same=1e-6, layouts=("EP2", "DP2", "TP2 ETP1")),
    ),
    trained(
        "ddp_num_buckets ddp_bucket_size ddp_pad_buckets_for_high_nccl_busbw align_grad_reduce "
        "align_param_gather gradient_reduce_div_fusion",
        "of data-parallel reduction",
        Example(flags=f"{SHARDED} --overlap-grad-reduce --ddp-num-buckets 3 "
                "--ddp-pad-buckets-for-high-nccl-busbw", same=1e-6, layouts=("EP2", "DP2")),
        Example(flags="--disable-align-grad-reduce --no-align-param-gather "
                "--no-gradient-reduce-div-fusion", same=0, layouts=("EP2", "PP2")),
    ),
    trained(
        "num_distributed_optimizer_instances",
        "copies of the sharded state",
        Example(flags=f"{SHARDED} --overlap-grad-reduce --num-distributed-optimizer-instances 2",
                same=1e-6, layouts=("four ranks",), stock="four ranks"),
    ),
    trained("use_tp_pp_dp_mapping", "the order of ranks",
            Example(flags="--use-tp-pp-dp-mapping", same=0, layouts=("PP2 DP2",), stock="PP2 DP2")),
    trained(
        "use_gloo_process_groups distributed_timeout_minutes "
        "distributed_timeout_seconds_after_init",
        "of process groups",
        Example(flags="--disable-gloo-process-groups --distributed-timeout-minutes 5", same=0,
                layouts=("EP2",)),
    ),
    trained(
        "calculate_per_token_loss",
        "a micro-batch's balance loss is weighed by its tokens, as Megatron's own",
        shown=PARITY,
    ),
    trained(
        "delay_wgrad_compute overlap_moe_expert_parallel_comm "
        "overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release "
        "high_priority_a2a_comm_stream",
        "exchanges of experts beside another micro-batch; weight gradients of experts later: no "
        "bit of a step changes, which is profiled and planned",
        shown="tests/parity/test_overlapped_schedule.py::test_a_schedule_changes_no_number "
        "tests/parity/test_overlapped_schedule.py::test_a_profile_reads_the_same_work "
        "tests/unit/planning/test_trace_server.py::test_a_gpu_job",
    ),
    trained(
        "pipeline_model_parallel_layout decoder_first_pipeline_num_layers "
        "decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split",
        "stages of unlike size",
        Example(flags="--decoder-first-pipeline-num-layers 1", beside="--num-layers 4", same=1e-6,
                layouts=("PP2",), stock="PP2"),
        Example(flags="--pipeline-model-parallel-layout Et|tttL", beside="--num-layers 4",
                same=1e-6, layouts=("PP2",), stock="PP2"),
        shown="tests/parity/test_pipeline_stages.py::test_same_numbers_as_one_rank",
    ),
    trained(
        "cp_comm_type hierarchical_context_parallel_sizes",
        "of attention: p2p, a2a, all_gather and a2a+p2p; CPU ranks gather keys and values "
        "for all of them",
        Example(flags="--cp-comm-type a2a", same=1e-6, layouts=("CP2",), stock="CP2"),
        shown="tests/parity/test_sequences.py::test_same_numbers_as_one_rank",
    ),
    trained(
        "ddp_average_in_collective ddp_reduce_scatter_with_fp32_accumulation "
        "use_layer_wise_param_layout",
        "of data-parallel reduction",
        Example(flags="--ddp-average-in-collective", same=1e-6, layouts=("DP2",)),
    ),
    unrun(
        "defer_embedding_wgrad_compute wgrad_deferral_limit",
        "of the output layer, with gradients added by its kernel",
        "--defer-embedding-wgrad-compute --pipeline-model-parallel-size 2",
    ),
    refused(
        "overlap_param_gather_with_optimizer_step",
        "Megatron 0.19 has it not with distributed checkpoints",
        ("--overlap-param-gather-with-optimizer-step --use-distributed-optimizer "
         "--overlap-param-gather --overlap-grad-reduce --pipeline-model-parallel-size 2 "
         "--num-layers 4 --num-virtual-stages-per-pipeline-rank 2", "distributed checkpointing"),
    ),
    trained(
        "use_megatron_fsdp use_torch_fsdp2 data_parallel_sharding_strategy "
        "torch_fsdp2_reshard_after_forward",
        "weights cut over replicas, by Megatron FSDP or torch's FSDP2, train as replicas do; "
        "Megatron FSDP's checkpoints are saved expert by expert and read by other layouts; FSDP2's "
        "and those of no_shard are refused, which Megatron 0.19 itself cannot save and load; FSDP2 "
        "is not planned",
        shown="tests/parity/test_sharded_weights.py::test_shards_train_as_replicas "
        "tests/parity/test_sharded_weights.py::test_keep_all_is_stock "
        "tests/integration/test_sharded_checkpoints.py::test_goes_on_as_if_never_stopped "
        "tests/integration/test_sharded_checkpoints.py::test_goes_on_in_another_layout",
    ),
    unrun(
        "outer_dp_sharding_strategy fsdp_* suggested_communication_unit_size "
        "keep_fp8_transpose_cache megatron_fsdp_* init_model_with_meta_device",
        "buffers and formats of Megatron FSDP",
    ),
    refused(
        "expert_tensor_parallel_num_weight_shards",
        "MoNE's experts are not cut over replicas",
        ("--expert-tensor-parallel-num-weight-shards 2",
         "expert_tensor_parallel_num_weight_shards"),
    ),
    unrun("tensor_parallel_num_weight_shards",
          "weights of Transformer Engine's dense linears cut over replicas; not planned"),
)  # fmt: skip
