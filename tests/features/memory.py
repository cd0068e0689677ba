"""Rows of what is kept for the backward pass, and of how the passes are run."""

from tests.features.row import Example, refused, trained, unrun

FULL = "--recompute-granularity full"
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
        "it keeps Megatron's experts' activations",
        ("--moe-paged-stash", "moe_paged_stash"),
    ),
    refused(
        "cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers",
        "what MoNE's experts keep would stay",
        ("--cpu-offloading-num-layers 1", "cpu_offloading_num_layers"),
    ),
    refused(
        "fine_grained_activation_offloading offload_modules delay_offload_until_cuda_graph "
        "delta_offload_bytes_across_pp_ranks min_offloaded_tensor_size "
        "activation_offload_fraction fine_grained_offloading_max_inflight_offloads",
        "expert_fc1, moe_act and fused_group_mlp; other modules are taken",
        ("--fine-grained-activation-offloading --offload-modules expert_fc1", "offload_modules"),
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
