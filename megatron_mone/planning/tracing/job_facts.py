"""What a job's arguments say that the cost model needs, as plain numbers that JSON holds.

Read from arguments that Megatron has validated, so that whatever it derives or defaults is its own.
Touches nothing.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from pydantic import StrictBool

from megatron_mone.common.documents import AnyText, Number, Text, Whole
from megatron_mone.common.phases import (
    ATTENTION,
    BALANCE_LOSS,
    COMBINE,
    DENSE_MLP,
    DISPATCH,
    GATE_GEMM,
    LATENT,
    LAYER_NORM,
    PERMUTE,
    PHASES,
    ROUTER,
    SELECTION,
    SHARED_EXPERTS,
    UP_DOWN_GEMM,
)
from megatron_mone.config_checks import FULL_ITERATION, captured
from megatron_mone.deepspeed.settings import is_deepspeed, settings_of


@dataclass(frozen=True)
class JobFacts:
    """The layout, shapes and switches of one job.

    Attributes:
        world_size: W, ranks.
        tp, cp, pp, vp: tensor and context parallel sizes, pipeline stages and chunks of each.
        ep, etp: expert and expert tensor parallel sizes.
        dp, edp: copies of what is not an expert, and of the experts.
        micro_batch_size, global_batch_size: samples.
        micro_batches: of a step, through each pipeline.
        seq_length: tokens of a sample.
        params_dtype: "bfloat16", ...
        fp8: recipe, "" without.
        num_layers, hidden_size: of the decoder.
        num_experts, topk: E and K_E; 0 in a dense model.
        router_groups, router_group_topk: of group-limited routing; 0 without.
        moe_ffn_hidden_size: F; 0 in a dense model.
        neurons_per_token: K_N; F where experts are stock.
        dispatcher: "alltoall", "allgather", or "flex:" and its backend; "" in a dense model.
        overlap_grad_reduce, overlap_param_gather, overlap_tp, overlap_p2p: which communication
            goes on beside compute.
        overlap_expert_parallel: whether that of experts goes on beside another micro-batch.
        delay_wgrad: whether weight gradients are made apart from input gradients.
        microbatch_group_size_per_vp_stage: micro-batches in a row through one chunk.
        distributed_optimizer: whether data-parallel ranks share its state.
        num_distributed_optimizer_instances: copies of that shared state.
        bucket_size: parameters of a gradient bucket; 0: all in one.
        recompute_granularity: "", "selective" or "full".
        recompute_modules: of selective recompute.
        model_flops_per_step: of all ranks, the experts read as dense: what published utilisation
            and TFLOP/s divide by time.
        executed_flops_per_step, active_flops_per_step: the same with the experts as they run, and
            with the kept neurons alone.
        zero_stage: of DeepSpeed's engine; None where Megatron's steps.
        fsdp: what Megatron FSDP cuts over replicas, its data_parallel_sharding_strategy; "" where
            it does not hold the model.
        overlap_zero: whether what either sends in a pass goes on beside compute.
        overlap_dispatch_backward: whether the backward of the dispatch goes on beside the weight
            gradients of its experts.
        graphs_per_layer: CUDA graphs that a layer's pass is launched as; 0: kernel by kernel.
        graphed: phases whose kernels are launched by graphs.
        document_tokens: of each packed document, of those that attend to themselves alone; 0: they
            are not packed.
        score_flops_per_step: of packed documents: what `model_flops_per_step` has of pairs of
            positions where each sample is one document.
        overlap_host_copies: whether the host updates a parameter as soon as its gradient has come.
    """

    world_size: Whole
    tp: Whole
    cp: Whole
    pp: Whole
    vp: Whole
    ep: Whole
    etp: Whole
    dp: Whole
    edp: Whole
    micro_batch_size: Whole
    global_batch_size: Whole
    micro_batches: Whole
    seq_length: Whole
    params_dtype: AnyText
    fp8: AnyText
    num_layers: Whole
    hidden_size: Whole
    num_experts: Whole
    topk: Whole
    router_groups: Whole
    router_group_topk: Whole
    moe_ffn_hidden_size: Whole
    neurons_per_token: Whole
    dispatcher: AnyText
    overlap_grad_reduce: StrictBool
    overlap_param_gather: StrictBool
    overlap_tp: StrictBool
    overlap_expert_parallel: StrictBool
    overlap_p2p: StrictBool
    delay_wgrad: StrictBool
    microbatch_group_size_per_vp_stage: Whole
    distributed_optimizer: StrictBool
    num_distributed_optimizer_instances: Whole
    bucket_size: Whole
    recompute_granularity: AnyText
    recompute_modules: tuple[Text, ...]
    model_flops_per_step: Number
    executed_flops_per_step: Number
    active_flops_per_step: Number
    zero_stage: Whole | None = None
    fsdp: AnyText = ""
    overlap_zero: StrictBool = False
    overlap_dispatch_backward: StrictBool = False
    graphs_per_layer: Whole = 0
    graphed: tuple[Text, ...] = ()
    overlap_host_copies: StrictBool = False
    document_tokens: Whole = 0
    score_flops_per_step: Number = 0.0


DOCUMENT_TOKENS = 1024
"""Assumed of packed documents, and all of a sample where that is shorter: a mean over tokens."""
_EXPERTS = (
    LAYER_NORM, ROUTER, LATENT, PERMUTE, DISPATCH, GATE_GEMM, SELECTION, UP_DOWN_GEMM,
    BALANCE_LOSS, COMBINE, SHARED_EXPERTS,
)  # fmt: skip
_IN_GRAPH: dict[str, tuple[str, ...]] = {
    "attn": (ATTENTION,),
    "mlp": (DENSE_MLP,),
    "moe": _EXPERTS,
    "moe_router": (LAYER_NORM, ROUTER),
}
"""Module of --cuda-graph-modules -> phases that it is whole (transformer_layer.py:
_te_cuda_graph_capture). moe_preprocess is a part of one, and is priced as launched by the host."""


def _graphs(args: Namespace) -> dict[str, Any]:
    kind, modules = captured(args)
    if kind == "none":
        return {}
    if kind == FULL_ITERATION:
        return {"graphed": tuple(PHASES)}
    names = tuple(name for name in _IN_GRAPH if not modules or name in modules)
    phases = dict.fromkeys(phase for name in names for phase in _IN_GRAPH[name])
    halves = ("attn" in names) + bool(set(names) - {"attn"})
    return {"graphs_per_layer": halves if modules else 1, "graphed": tuple(phases)}


def job_facts(args: Namespace, model_config: Any) -> JobFacts:
    """The facts of a job.

    Args:
        args: Megatron's, validated.
        model_config: the GPTModelConfig made of them.
    """
    from megatron.training.training import num_floating_point_operations

    from megatron_mone.model.step_flops import step_flops

    config = model_config.transformer
    batch = args.global_batch_size
    executed, active = step_flops(args, config, batch)
    model = float(num_floating_point_operations(args, batch))
    packed: dict[str, Any] = {}
    if args.dataloader_inter_document_masking:
        scores = model - float(
            num_floating_point_operations(args, batch, 0, batch * args.seq_length)
        )
        tokens = min(DOCUMENT_TOKENS, args.seq_length)
        less = scores * (1 - tokens / args.seq_length)
        model, executed, active = model - less, executed - less, active - less
        packed = {"document_tokens": tokens, "score_flops_per_step": scores}
    return JobFacts(
        **_layout(args),
        **_experts(args, config),
        **{**_overlap(args), **_fsdp(args)},
        seq_length=args.seq_length,
        params_dtype=str(config.params_dtype).removeprefix("torch."),
        fp8=str(args.fp8_recipe) if args.fp8 else "",
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        distributed_optimizer=args.use_distributed_optimizer,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        bucket_size=_bucket_size(args),
        recompute_granularity=args.recompute_granularity or "",
        recompute_modules=_recompute_modules(args, config),
        model_flops_per_step=model,
        executed_flops_per_step=executed,
        active_flops_per_step=active,
        **_zero(args),
        **_graphs(args),
        **packed,
    )


def _layout(args: Namespace) -> dict[str, Any]:
    pp, etp = args.pipeline_model_parallel_size, args.expert_tensor_parallel_size
    ep, dp = args.expert_model_parallel_size, args.data_parallel_size
    return {
        "world_size": args.world_size,
        "tp": args.tensor_model_parallel_size,
        "cp": args.context_parallel_size,
        "pp": pp,
        "vp": args.virtual_pipeline_model_parallel_size or 1,
        "ep": ep,
        "etp": etp,
        "dp": dp,
        "edp": args.world_size // (etp * ep * pp),
        "micro_batch_size": args.micro_batch_size,
        "global_batch_size": args.global_batch_size,
        "micro_batches": args.global_batch_size // (args.micro_batch_size * dp),
        "microbatch_group_size_per_vp_stage": args.microbatch_group_size_per_vp_stage or pp,
    }


def _experts(args: Namespace, config: Any) -> dict[str, Any]:
    if args.num_experts is None:
        numbers = ("num_experts", "topk", "router_groups", "router_group_topk",
                   "moe_ffn_hidden_size", "neurons_per_token")  # fmt: skip
        return {**dict.fromkeys(numbers, 0), "dispatcher": ""}
    from megatron_mone.config import neurons_per_token

    width = config.moe_ffn_hidden_size
    is_mone = getattr(config, "mone_enabled", False)
    dispatcher = config.moe_token_dispatcher_type
    if dispatcher == "flex":
        dispatcher = f"flex:{config.moe_flex_dispatcher_backend}"
    return {
        "num_experts": config.num_moe_experts,
        "topk": config.moe_router_topk,
        "router_groups": config.moe_router_num_groups or 0,
        "router_group_topk": config.moe_router_group_topk or 0,
        "moe_ffn_hidden_size": width,
        "neurons_per_token": neurons_per_token(config) if is_mone else width,
        "dispatcher": dispatcher,
    }


def _overlap(args: Namespace) -> dict[str, Any]:
    return {
        "overlap_grad_reduce": args.overlap_grad_reduce,
        "overlap_param_gather": args.overlap_param_gather,
        "overlap_tp": args.tp_comm_overlap,
        "overlap_expert_parallel": args.overlap_moe_expert_parallel_comm,
        "overlap_p2p": args.overlap_p2p_comm,
        "delay_wgrad": args.delay_wgrad_compute,
        "overlap_dispatch_backward": args.overlap_dispatch_backward_with_experts_wgrad,
        # A copy into memory that is not pinned holds the host up.
        "overlap_host_copies": args.overlap_cpu_optimizer_d2h_h2d and args.pin_cpu_grads,
    }


def _zero(args: Namespace) -> dict[str, Any]:
    if not is_deepspeed(args):
        return {}
    zero = settings_of(args)["zero_optimization"]
    # Without a value, as `overlap_comm_valid` of DeepSpeedZeroConfig has it.
    overlap = zero.get("overlap_comm")
    return {
        "zero_stage": zero["stage"],
        "overlap_zero": zero["stage"] == 3 if overlap is None else bool(overlap),
    }


def _fsdp(args: Namespace) -> dict[str, Any]:
    """As MegatronFSDP.__init__ has it, whose overlap is not the arguments' where it cuts gradients
    or weights."""
    if not args.use_megatron_fsdp:
        return {}
    cut = args.data_parallel_sharding_strategy
    in_passes = cut in ("optim_grads", "optim_grads_params")
    return {
        "fsdp": cut,
        "overlap_zero": in_passes,
        "overlap_grad_reduce": args.overlap_grad_reduce or in_passes,
        "overlap_param_gather": args.overlap_param_gather or cut == "optim_grads_params",
    }


def _bucket_size(args: Namespace) -> int:
    """As resolve_ddp_bucket_size of megatron/training/training.py.

    Raises:
        ValueError: the buckets are given by number, which says their size only in a built model.
    """
    if args.ddp_num_buckets is not None:
        raise ValueError(
            f"ddp_num_buckets = {args.ddp_num_buckets} cannot be planned: give the parameters of a "
            "bucket instead, --ddp-bucket-size"
        )
    if not args.overlap_grad_reduce:
        return 0
    replicas = args.data_parallel_size * args.context_parallel_size
    return args.ddp_bucket_size or max(40_000_000, 1_000_000 * replicas)


def _recompute_modules(args: Namespace, config: Any) -> tuple[str, ...]:
    selective = args.recompute_granularity == "selective"
    return tuple(config.recompute_modules or ()) if selective else ()
