"""How the model, its batches and the ranks divide: what Megatron asserts when it builds groups,
layers and schedules, or finds out in a shape. Touches nothing.
"""

from argparse import Namespace


def check_layout(args: Namespace) -> None:
    """The layout of a job.

    Args:
        args: Megatron's, validated; `world_size` is the job's.

    Raises:
        ValueError: something does not divide, or leaves a stage without layers.
    """
    _check_expert_ranks(args)
    _check_replicas(args)
    _check_attention(args)
    _check_widths(args)
    _check_layer_kinds(args)
    _check_stages(args)
    _check_packing(args)
    _check_context_parallel(args)
    for kind in ("", "eval_"):
        _check_micro_batches(args, kind)


def _check_expert_ranks(args: Namespace) -> None:
    """parallel_state: expert layers have a layout of their own, over all ranks of a stage."""
    etp, ep = args.expert_tensor_parallel_size, args.expert_model_parallel_size
    pp = args.pipeline_model_parallel_size
    shards = getattr(args, "expert_gtp_weight_remat_size", 1) or 1
    if args.world_size % (etp * ep * pp * shards) == 0:
        return
    sizes = f"expert_tensor_parallel_size = {etp}"
    if etp == args.tensor_model_parallel_size > 1:
        sizes += " (tensor_model_parallel_size, where it is not given)"
    sizes += f" x expert_model_parallel_size = {ep} x pipeline_model_parallel_size = {pp}"
    if etp > 1 and args.world_size % (ep * pp * shards) == 0:
        fix = "set expert_tensor_parallel_size: 1"
    else:
        fix = "lower one of them, or give more ranks"
    raise ValueError(f"{sizes} must divide the job's {args.world_size} ranks: {fix}")


def _check_replicas(args: Namespace) -> None:
    instances = args.num_distributed_optimizer_instances
    replicas = args.data_parallel_size * args.context_parallel_size
    if replicas % instances:
        raise ValueError(
            f"num_distributed_optimizer_instances = {instances} must divide data parallel x "
            f"context parallel = {replicas}: give a divisor, or leave it out"
        )


def _check_attention(args: Namespace) -> None:
    """attention.py makes query, key and value of groups of heads; rotary turns channel pairs."""
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.group_query_attention and heads % groups:
        raise ValueError(
            f"num_query_groups = {groups} must divide num_attention_heads = {heads}: give one of "
            f"{_listed(_divisors(heads))}"
        )
    turned = int(args.kv_channels * args.rotary_percent)
    if args.position_embedding_type == "rope" and not args.multi_latent_attention and turned % 2:
        share = "" if args.rotary_percent == 1 else f" x rotary_percent = {args.rotary_percent}"
        raise ValueError(
            f"kv_channels = {args.kv_channels}{share} makes {turned} rotary channels a head, which "
            "must be even: give another kv_channels, or hidden_size / num_attention_heads"
        )


def _check_widths(args: Namespace) -> None:
    """tensor_parallel splits widths evenly, and the sequence where that is parallel as well."""
    tp, etp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    of_tp, of_etp = f"tensor_model_parallel_size = {tp}", f"expert_tensor_parallel_size = {etp}"
    widths = [("hidden_size", tp, of_tp)] if tp > 1 else []
    if _has_dense_layers(args):
        widths.append(("ffn_hidden_size", tp, of_tp))
    if args.num_experts:
        widths.append(("moe_ffn_hidden_size", etp, of_etp))
        widths.append(("moe_shared_expert_intermediate_size", tp, of_tp))
    for name, parts, by in widths:
        width = getattr(args, name)
        if width is not None and width % parts:
            raise ValueError(f"{name} = {width} must be a multiple of {by}: change one of them")
    cp = args.context_parallel_size
    if args.sequence_parallel and args.seq_length % (tp * cp):
        by = of_tp if cp == 1 else f"{of_tp} x context_parallel_size = {cp}"
        raise ValueError(
            f"seq_length = {args.seq_length} must be a multiple of {by} with sequence_parallel: "
            f"give {args.seq_length // (tp * cp) * tp * cp or tp * cp}"
        )


def _has_dense_layers(args: Namespace) -> bool:
    freq = args.moe_layer_freq
    if not args.num_experts:
        return True
    return 0 in freq if isinstance(freq, list) else freq > 1 and args.num_layers > 1


def _check_layer_kinds(args: Namespace) -> None:
    freq = args.moe_layer_freq
    if not args.num_experts:
        return
    if isinstance(freq, list) and len(freq) != args.num_layers:
        raise ValueError(
            f"moe_layer_freq has {len(freq)} entries, and num_layers = {args.num_layers}: give one "
            "for each layer"
        )
    if isinstance(freq, list) and not set(freq) <= {0, 1}:
        raise ValueError(f"moe_layer_freq = {freq} is not allowed: 1 is a layer of experts, 0 not")
    if isinstance(freq, int) and freq < 1:
        raise ValueError(f"moe_layer_freq = {freq} is not allowed: it must be 1 or more")


def _check_stages(args: Namespace) -> None:
    """transformer_block.get_num_layers_to_build: every stage, and chunk of one, has its layers."""
    if args.hybrid_layer_pattern is not None:
        return
    if args.pipeline_model_parallel_layout is not None:
        _check_mtp_stage(args)
        return
    pp, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    if pp == 1:
        return
    given = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    uneven = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    layers = args.num_layers - sum(uneven.values())
    if not uneven:
        layers += args.account_for_embedding_in_pipeline_split
        layers += args.account_for_loss_in_pipeline_split
    elif args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split:
        raise ValueError(
            f"{next(iter(uneven))} cannot be given with account_for_embedding_in_pipeline_split or "
            "account_for_loss_in_pipeline_split: leave one out, or give a "
            "pipeline_model_parallel_layout"
        )
    left = pp - len(uneven)
    if (left == 0 and layers != 0) or (left and (layers < left or layers % left)):
        taken = "".join(f" less {name} = {n}" for name, n in uneven.items())
        raise ValueError(
            f"num_layers = {args.num_layers}{taken} leaves {layers} layers for {left} of the "
            f"pipeline_model_parallel_size = {pp} stages: they must be the same number, 1 or more, "
            "in each"
        )
    sizes = [*uneven.values(), *([layers // left] if left else [])]
    if any(size % chunks for size in sizes):
        raise ValueError(
            f"a stage of {_listed(sizes)} layers has no {chunks} chunks of equal size: give "
            "another num_virtual_stages_per_pipeline_rank or num_layers_per_virtual_pipeline_stage"
        )


def _check_mtp_stage(args: Namespace) -> None:
    """pipeline_parallel_layer_layout.py forbids it in all chunks of the first rank but the last,
    where two copies of the embedding on one rank wait for each other."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout, pp = args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout(layout, pp)
    if pp > 1 and LayerType.mtp in layout.layout[0][-1]:
        raise ValueError(
            f"pipeline_model_parallel_layout = {layout.input_data!r} puts m, multi-token "
            "prediction, on the first pipeline rank, which has the embedding: put it on another"
        )


def _check_packing(args: Namespace) -> None:
    """Documents that know nothing of each other lie behind one another, [micro-batch x s, 1, H]."""
    if not args.dataloader_inter_document_masking:
        return
    if args.context_parallel_size > 1:
        raise ValueError(
            f"context_parallel_size = {args.context_parallel_size} does not go with "
            "dataloader_inter_document_masking: rotary positions are cut by document, and "
            "documents have lengths of any number: leave one of them out"
        )
    size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if args.micro_batch_size > 1 and size > 1:
        raise ValueError(
            f"micro_batch_size = {args.micro_batch_size} does not go with "
            f"dataloader_inter_document_masking at tensor x pipeline parallel = {size}: Megatron "
            "sends stages, and cuts for tensor parallelism, what it takes for one sequence a "
            "sample: pass --micro-batch-size 1"
        )


def _check_context_parallel(args: Namespace) -> None:
    """How attention exchanges keys and values: transformer_engine.py asserts it, or ends deep in
    attention."""
    cp, kinds = args.context_parallel_size, args.cp_comm_type
    if cp == 1:
        return
    known = ("p2p", "all_gather", "a2a", "a2a+p2p")
    sizes = args.hierarchical_context_parallel_sizes
    tp = args.tensor_model_parallel_size
    latent, grouped = args.multi_latent_attention, args.group_query_attention
    heads = args.num_query_groups if grouped and not latent else args.num_attention_heads
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"cp_comm_type = {kind!r} must be one of {', '.join(known)}")
        if kind == "a2a+p2p" and not sizes:
            raise ValueError(
                "cp_comm_type = 'a2a+p2p' needs hierarchical_context_parallel_sizes: give the "
                "ranks of its inner (a2a) and outer (p2p) groups, such as 2 2"
            )
        over = {"a2a": cp, "a2a+p2p": sizes[0] if sizes else 1}.get(kind, 1)
        if heads % (tp * over):
            raise ValueError(
                f"cp_comm_type = {kind!r} gives heads to ranks: {heads} of them "
                f"{'(num_query_groups) ' if heads != args.num_attention_heads else ''}must be a "
                f"multiple of tensor_model_parallel_size = {tp} x {over} ranks: give all_gather or "
                "p2p"
            )
    if len(kinds) not in (1, args.num_layers):
        raise ValueError(
            f"cp_comm_type has {len(kinds)} entries, and num_layers = {args.num_layers}: give one, "
            "or one for each layer"
        )


def _check_micro_batches(args: Namespace, kind: str) -> None:
    """schedules.py: the interleaved schedule takes micro-batches in groups."""
    pp, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    if chunks is None or getattr(args, "step_batch_size_schedule", None):
        return
    batch, micro = f"{kind}global_batch_size", f"{kind}micro_batch_size"
    number = getattr(args, batch) // (getattr(args, micro) * args.data_parallel_size)
    group = args.microbatch_group_size_per_vp_stage or pp
    if not pp <= group <= number or 0 < number % group < pp:
        raise ValueError(
            f"{batch} = {getattr(args, batch)} is {number} micro-batches of {micro} = "
            f"{getattr(args, micro)} on each of {args.data_parallel_size} replicas: with virtual "
            f"pipeline stages it must be a multiple of pipeline_model_parallel_size = {pp}"
            + (
                f", in groups of microbatch_group_size_per_vp_stage = {group}"
                if group != pp
                else ""
            )
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(numbers)))
