"""Values that Megatron 0.19 takes, each alone or together, and cannot run, or runs in silence as if
they were not there. Imports the module that --spec names; touches nothing else.
"""

from argparse import Namespace
from importlib import import_module

from megatron_mone.config import OUR_SPEC
from megatron_mone.config_checks import is_mone
from megatron_mone.model.checks.graphs import check_graphs
from megatron_mone.moe.stored_choice import is_mixed

KEPT = "gate, up and index of each kept neuron"
"""What the kernels of MoNE keep for the backward pass beside the experts' input."""

HAND_OVER = "--fine-grained-activation-offloading --offload-modules expert_fc1 moe_act moves theirs"


def check_combinations(args: Namespace) -> None:
    """What Megatron's own checks let through.

    Args:
        args: Megatron's, parsed.

    Raises:
        ValueError: names the argument, its value and what to do.
    """
    for wrong, name, says in _general(args) + _data(args) + _model(args):
        if wrong:
            raise ValueError(f"{name} = {getattr(args, name)!r} {says}")
    _check_spec(args)
    if is_mone(args):
        for wrong, name, says in _with_mone(args):
            if wrong:
                raise ValueError(
                    f"{name} = {getattr(args, name)!r} is not allowed with MoNE: {says}"
                )
        check_graphs(args)
        if args.moe_use_upcycling:
            _check_upcycling(args)


def _general(args: Namespace) -> list[tuple[object, str, str]]:
    """(whether it is wrong, argument, what to say) of training itself."""
    is_sharded_sgd = args.optimizer == "sgd" and args.use_distributed_optimizer
    return [
        (args.adlr_autoresume, "adlr_autoresume", "needs a module of NVIDIA's own cluster, and "
         "Megatron exits with status 0 without it: leave it out; `python -m launch` resumes jobs"),
        (is_sharded_sgd, "optimizer", "does not go with use_distributed_optimizer, which takes "
         "optimizers with a state: leave out --use-distributed-optimizer"),
        (args.config_logger_dir, "config_logger_dir", "ends in a TypeError, for Megatron 0.19 "
         "copies process groups with the config: leave it out"),
        (args.moe_use_upcycling and not is_mone(args), "moe_use_upcycling", "ends in a TypeError "
         "with stock experts, for Megatron 0.19 gives load_checkpoint an argument it does not "
         "take: give mone_neuron_ratio = 1.0, whose experts keep every neuron as stock ones do"),
        (args.moe_enable_routing_replay, "moe_enable_routing_replay", "would have no effect: it "
         "waits for routes from a program; give --mone-replay-routing DIR instead"),
        (_loses_count(args), "offload_modules", "ends in the second step, in Megatron's assertion "
         "`Chunk mismatch`, where a chunk of the pipeline has one layer, with stock models too: "
         "give chunks of two layers, or offload expert_fc1 and moe_act alone"),
        (_starts_without_weights(args), "load", "leaves weights as they were allocated, with "
         "--no-initialization or --init-model-with-meta-device: give --load, or leave that out"),
    ]  # fmt: skip


def _starts_without_weights(args: Namespace) -> bool:
    sharded = args.use_megatron_fsdp or args.use_torch_fsdp2  # these initialise what meta left out
    on_meta = args.init_model_with_meta_device and not sharded
    without = on_meta or not args.perform_initialization
    return without and not (args.load or args.pretrained_checkpoint)


def _loses_count(args: Namespace) -> bool:
    """Whether ChunkOffloadHandler.finish_all_groups takes a chunk for finished too early: in one
    layer nothing waits between its groups once the last of each name stays on the device. Seen
    with four modules; two went."""
    pp = args.pipeline_model_parallel_size
    layers = args.num_layers_per_virtual_pipeline_stage
    if layers is None and args.num_layers:
        layers = args.num_layers // pp // (args.num_virtual_stages_per_pipeline_rank or 1)
    return pp > 1 and layers == 1 and len(set(args.offload_modules or ())) > 2


def _data(args: Namespace) -> list[tuple[object, str, str]]:
    no_cache = args.data_cache_path is None
    of_one_split = args.multiple_validation_sets and not args.full_validation
    return [
        (args.dataloader_type == "external", "dataloader_type", "takes batches from a script of "
         "one's own; this entry's are Megatron's: give single or cyclic"),
        (of_one_split, "multiple_validation_sets", "needs --full-validation in Megatron 0.19"),
        (args.dataloader_fast_cache_load and no_cache, "dataloader_fast_cache_load",
         "needs --data-cache-path"),
        (args.dataloader_defer_npy_index_mmap and no_cache, "dataloader_defer_npy_index_mmap",
         "needs --data-cache-path"),
        (args.dataloader_fast_cache_load and args.data_path, "dataloader_fast_cache_load",
         "does not go with --data-path: give --train-data-path, --valid-data-path and "
         "--test-data-path"),
        (args.tokenizer_type == "NullMultimodalTokenizer", "tokenizer_type", "is of multimodal "
         "models; this entry trains GPT models: give NullTokenizer"),
        (args.tokenizer_type == "NullTokenizer" and args.vocab_size is None
         and not args.use_checkpoint_args, "vocab_size", "is not given, and tokenizer_type = "
         "'NullTokenizer' knows none: give the number of tokens"),
    ]  # fmt: skip


def _model(args: Namespace) -> list[tuple[object, str, str]]:
    sizes = args.tensor_model_parallel_size
    fits = args.world_size % sizes == 0  # if not, Megatron says so
    splits_moe = args.num_experts and sizes > 1 and fits and not args.sequence_parallel
    return [
        (args.init_method_xavier_uniform and args.use_mup, "init_method_xavier_uniform", "does not "
         "go with use_mup, which scales Megatron's own method: leave one of them out"),
        (splits_moe, "sequence_parallel", f"does not go with num_experts = {args.num_experts} and "
         f"tensor_model_parallel_size = {sizes}, whose MoE layers Megatron trains with it alone: "
         "pass --sequence-parallel"),
        (args.moe_latent_size and args.moe_shared_expert_overlap, "moe_shared_expert_overlap",
         "does not go with moe_latent_size in training: leave one of them out"),
        (args.use_grouped_gemm_for_dense_mlp and args.num_experts, "use_grouped_gemm_for_dense_mlp",
         f"would have no effect with num_experts = {args.num_experts}: Megatron's layer specs have "
         "it of models without experts alone; leave it out"),
        (args.position_embedding_type == "mrope", "position_embedding_type", "needs positions in "
         "three dimensions, of images: give rope"),
    ]  # fmt: skip


def _with_mone(args: Namespace) -> list[tuple[object, str, str]]:
    """Of what stock experts read and MoNE's do not."""
    layers = args.heterogeneous_layers_config_path or args.heterogeneous_layers_config_encoded_json
    fused = "fused_group_mlp" in (args.offload_modules or ())
    return [
        (args.spec and args.spec != OUR_SPEC, "spec", "its layers would be trained in place of "
         "MoNE's: leave one of them out"),
        (args.quick_geglu, "quick_geglu", "its experts' activation is mone_activation: give "
         "--swiglu"),
        (args.moe_mlp_glu_interleave_size, "moe_mlp_glu_interleave_size", "its gates and ups lie "
         "apart, and a checkpoint that mixes them would be read wrongly: leave it out"),
        (args.te_precision_config_file, "te_precision_config_file", "its experts are no layers of "
         "Transformer Engine, and would keep the format of --fp8-format: leave it out"),
        (args.moe_paged_stash, "moe_paged_stash", "its pages are of what Transformer Engine's "
         f"fused experts keep, and its kernels run on GPUs alone: leave it out; {HAND_OVER}"),
        *((getattr(args, name), name, "it is of Transformer Engine's experts; leave it out")
          for name in ("moe_single_grouped_weight", "moe_single_grouped_bias")),
        (fused, "offload_modules", "fused_group_mlp is of Transformer Engine's fused experts: name "
         f"expert_fc1, their input here, and moe_act, {KEPT}"),
        (args.cpu_offloading_num_layers, "cpu_offloading_num_layers", "Transformer Engine moves "
         "what its own modules mark, not what MoNE's experts keep, their input and "
         f"{KEPT}: leave it out; {HAND_OVER}"),
        ("moe_act" in (args.recompute_modules or ()) and args.mone_backend == "reference",
         "recompute_modules", "mone_backend = reference keeps all that it computes: name moe "
         "instead of moe_act, or another mone_backend"),
        (args.mlp_chunks_for_training > 1, "mlp_chunks_for_training", "each chunk would be a "
         "micro-batch of its own to the balance losses: leave it out"),
        ((args.expert_tensor_parallel_num_weight_shards or 1) > 1,
         "expert_tensor_parallel_num_weight_shards", "its experts are not cut over replicas: leave "
         "it out"),
        (layers, "heterogeneous_layers_config_path", "Megatron builds another config class of it, "
         "without mone_* fields: leave it out"),
    ]  # fmt: skip


def _check_upcycling(args: Namespace) -> None:
    """What experts that are slices of a dense FFN need to be it together, and a load of them."""
    slices, factor = args.moe_upcycling_granularity, args.moe_router_topk_scaling_factor
    balancing = args.moe_router_load_balancing_type
    weights = "the weights of the chosen experts would not sum to 1"
    sharded = "use_megatron_fsdp" if args.use_megatron_fsdp else "use_torch_fsdp2"
    for wrong, name, says in (
        (slices < 1, "moe_upcycling_granularity", "give 1 or more"),
        (args.num_experts % max(slices, 1), "num_experts",
         f"it must divide by moe_upcycling_granularity = {slices}"),
        (args.moe_router_topk < 2 or args.moe_router_topk % max(slices, 1), "moe_router_topk",
         f"give 2 or more, the weight of one alone is 1 whatever its router says, and a multiple "
         f"of moe_upcycling_granularity = {slices}"),
        ((factor or 1) != slices, "moe_router_topk_scaling_factor", f"a copy's {slices} slices "
         f"share its weight: give {slices}.0, or another moe_upcycling_granularity"),
        (args.moe_router_pre_softmax, "moe_router_pre_softmax", f"{weights}: leave it out"),
        ("sinkhorn" in (balancing if isinstance(balancing, list) else [balancing]),
         "moe_router_load_balancing_type", f"{weights}: give another"),
        (args.moe_layer_freq != 1, "moe_layer_freq", "a dense model's layers are "
         "saved as one tensor, of which a part is not read: leave it out"),
        (is_mixed(args), "mone_layer_freq", "all layers must be alike: leave it out"),
        *((getattr(args, name), name, "a dense model has nothing that it could be made of: leave "
           "it out") for name in ("moe_shared_expert_intermediate_size", "moe_latent_size",
                                  "mtp_num_layers", "hybrid_layer_pattern")),
        (args.ckpt_format != "torch_dist", "ckpt_format", "give torch_dist"),
        (args.use_megatron_fsdp or args.use_torch_fsdp2, sharded, "weights are cut otherwise: "
         "leave it out until the run has saved"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(
                f"{name} = {getattr(args, name)!r} does not go with moe_use_upcycling: {says}"
            )


def _check_spec(args: Namespace) -> None:
    """Megatron logs that it cannot import the module and trains its default layers."""
    if args.spec is None:
        if args.attention_backend.name == "local":  # arguments.py looks at spec[0]
            raise ValueError(
                "attention_backend = local goes with a --spec that no GPT of Megatron 0.19 has: "
                "leave it out; --transformer-impl local has Megatron's own attention"
            )
        return
    written = " ".join(args.spec)
    if len(args.spec) != 2:
        raise ValueError(f"spec = {written!r} must be two words, a module and a name in it")
    try:
        found = hasattr(import_module(args.spec[0]), args.spec[1])
    except ImportError as error:
        raise ValueError(f"spec = {written!r} cannot be imported: {error}") from error
    if not found:
        raise ValueError(f"spec = {written!r}: the module has no {args.spec[1]!r}")
