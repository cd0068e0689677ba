"""Rows of what is kept for the backward pass, and of how the passes are run."""

from tests.features.row import Example, refused, trained, unrun

FULL = "--recompute-granularity full"
OFFLOADED = "--fine-grained-activation-offloading --min-offloaded-tensor-size 1 --offload-modules"
SELECTIVE = "--recompute-granularity selective --recompute-modules"

ROWS = (
    trained(
        "recompute_granularity recompute_method recompute_num_layers recompute_activations "
        "checkpoint_activations",
        "a recomputed forward keeps the choice of its first pass",
        Example(flags=f"{FULL} --recompute-method uniform --recompute-num-layers 1", same=1e-6),
        Example(flags=f"{FULL} --recompute-method block --recompute-num-layers 1", same=1e-6),
        Example(flags="--recompute-activations", same=1e-6),
    ),
    trained(
        "recompute_modules moe_layer_recompute",
        "core_attn, layernorm, mlp, moe, shared_experts, mla_up_proj; a line says that moe_act "
        "changes nothing: MoNE keeps gate, up and index of each chosen neuron alone",
        Example(flags=f"{SELECTIVE} core_attn moe", same=1e-6),
        Example(flags=f"{SELECTIVE} shared_experts",
                beside="--moe-shared-expert-intermediate-size 32", same=1e-6),
        Example(flags=f"{SELECTIVE} mlp", beside="--moe-layer-freq ([0]+[1]*1)", same=1e-6),
        # torch's norm rounds otherwise without autograd
        Example(flags=f"{SELECTIVE} layernorm", same=1e-5),
    ),
    refused(
        "distribute_saved_activations",
        "Megatron has it not with sequence parallelism, which its experts need under TP",
        (f"{FULL} --recompute-method uniform --recompute-num-layers 1 --sequence-parallel "
         "--distribute-saved-activations --tensor-model-parallel-size 2", "sequence parallel"),
    ),
    refused(
        "mlp_chunks_for_training",
        "a chunk would be a micro-batch of its own to the balance losses, Megatron's own included",
        ("--mlp-chunks-for-training 2", "mlp_chunks_for_training"),
    ),
    refused(
        "moe_paged_stash moe_paged_stash_*",
        "pages of what Transformer Engine's fused experts keep, by kernels that run on GPUs alone",
        ("--moe-paged-stash", "moe_paged_stash"),
    ),
    refused(
        "cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers",
        "Transformer Engine moves what its own modules mark; expert_fc1 and moe_act of "
        "offload_modules are MoNE's",
        ("--cpu-offloading-num-layers 1", "cpu_offloading_num_layers"),
    ),
    trained(
        "fine_grained_activation_offloading offload_modules min_offloaded_tensor_size "
        "activation_offload_fraction fine_grained_offloading_max_inflight_offloads "
        "delta_offload_bytes_across_pp_ranks",
        "expert_fc1 hands over the experts' input, moe_act gate, up and index of the kept neurons, "
        "other modules what they do without MoNE; on CPU ranks copied within their memory",
        Example(flags=f"{OFFLOADED} expert_fc1 moe_act", same=0.0),
        Example(flags=f"{OFFLOADED} expert_fc1 moe_act", beside="--num-layers 4", same=0.0,
                layouts=("PP2 VPP2",), stock=""),
        Example(flags=f"{OFFLOADED} expert_fc1 moe_act --activation-offload-fraction 0.5 "
                "--fine-grained-offloading-max-inflight-offloads 1 "
                "--delta-offload-bytes-across-pp-ranks 2000",
                beside="--num-layers 4", same=0.0, layouts=("PP2",), stock=""),
        shown="tests/unit/moe/test_activation_offload.py::"
        "test_what_is_handed_over_comes_back_to_the_bit",
    ),
    unrun(
        "delay_offload_until_cuda_graph",
        "copies after the replay of a graph",
    ),
    unrun(
        "cuda_graph_impl cuda_graph_modules cuda_graph_scope_deprecated cuda_graph_warmup_steps "
        "enable_cuda_graph external_cuda_graph optimizer_cuda_graph",
        "graphs of attn, mlp, mamba and the router; of `moe`, whole layers and iterations where a "
        "layer waits for nothing, which torch's fake CUDA tensors show; elsewhere a line says what "
        "waits (docs/TRAINING.md)",
        "--cuda-graph-impl local --cuda-graph-modules attn moe_router",
        "--cuda-graph-impl full_iteration --te-rng-tracker --no-check-for-nan-in-loss-and-grad "
        "--moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity",
        shown="tests/unit/moe/test_no_waits.py::test_a_layer_that_a_cuda_graph_may_hold "
        "tests/unit/checks/test_graphs.py::test_what_waits_is_refused",
    ),
)  # fmt: skip
