"""CUDA graphs over MoNE layers: what may be captured, judged before a model is built.

Within a captured region the host neither waits for the device nor runs code of ours again, so a
layer may be captured whose shapes are known ahead and that keeps what it counts on its device. Of
the regions of --cuda-graph-modules, attn, mlp and mamba hold nothing of ours, moe_router and
moe_preprocess end before the experts; moe, a whole layer (no module named) and a whole iteration
hold all of it. That a layer which is let through here waits for nothing is tested on torch's fake
CUDA tensors (tests/unit/moe/no_waits_cases.py); no graph was captured on a GPU yet. Touches
nothing.
"""

from argparse import Namespace

from megatron_mone.config import needs_all_gates
from megatron_mone.config_checks import FULL_ITERATION, captured, captures_experts


def check_graphs(args: Namespace) -> None:
    """Refuse a capture that would wait, or whose replays would leave out what is not on the device.

    Args:
        args: Megatron's, parsed, of a model with MoNE.

    Raises:
        ValueError: one line: what is captured, why it cannot be, and what to set.
    """
    kind, modules = captured(args)
    if kind == "none":
        return
    what = f"cuda_graph_impl = {kind!r}"
    if modules and kind != FULL_ITERATION:
        what += f" with cuda_graph_modules = {','.join(sorted(modules))}"
    holds_router = kind == FULL_ITERATION or not modules or modules - {"attn", "mlp", "mamba"}
    if holds_router and (args.mone_record_masks or args.mone_replay_masks):
        raise ValueError(
            f"{what} is not allowed with mone_record_masks or mone_replay_masks: a graph that "
            "holds the router would be replayed with the masks of its capture: leave one of them "
            "out, or capture attn alone"
        )
    if not captures_experts(args):
        return
    for wrong, reason, fix in _reasons(args, kind):
        if wrong:
            raise ValueError(
                f"{what} captures MoNE's experts, and {reason}: {fix}, or name modules without moe "
                "(--cuda-graph-modules attn moe_router)"
            )


def _reasons(args: Namespace, kind: str) -> list[tuple[object, str, str]]:
    """(whether it is so, why that cannot be captured, what to set instead)."""
    dispatcher = args.moe_token_dispatcher_type
    padded = args.moe_pad_expert_input_to_capacity and args.moe_expert_capacity_factor is not None
    backend, factor = args.moe_flex_dispatcher_backend, args.moe_expert_rank_capacity_factor
    bounded = backend == "hybridep" and factor is not None
    put_off = args.delay_wgrad_compute or args.overlap_dispatch_backward_with_experts_wgrad
    recomputed = args.recompute_granularity == "full" or "moe" in (args.recompute_modules or ())
    scope = args.mone_ng_loss_scope
    ranks = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return [
        (dispatcher == "allgather",
         "moe_token_dispatcher_type = 'allgather' gives them as many rows as were routed",
         "set it to alltoall"),
        (dispatcher == "flex" and not bounded,
         "the flex dispatcher has the host ask how many rows they get",
         "set moe_flex_dispatcher_backend to hybridep, with --moe-expert-rank-capacity-factor"),
        (dispatcher == "alltoall" and not padded,
         "the number of rows they get is known when they are routed",
         "give every expert as many, --moe-expert-capacity-factor FACTOR and "
         "--moe-pad-expert-input-to-capacity"),
        (args.moe_router_padding_for_quantization,
         "moe_router_padding_for_quantization pads to a number that is known when they are routed",
         "leave it out"),
        (args.mone_backend not in ("auto", "triton"),
         f"mone_backend = {args.mone_backend!r} waits for the number of its rows",
         "set it to triton"),
        (args.mone_selection != "topk",
         f"mone_selection = {args.mone_selection!r} keeps as many neurons as it finds",
         "set it to topk"),
        (args.mone_ng_loss_type == "bias",
         "with mone_ng_loss_type = 'bias' the host waits for how many neurons were chosen",
         "set it to selected"),
        (args.mone_neuron_groups % ranks,
         f"mone_neuron_groups = {args.mone_neuron_groups} has the {ranks} ranks of an expert agree "
         "on its neurons",
         "set mone_neuron_groups to a multiple of expert_tensor_parallel_size"),
        (needs_all_gates(args),
         "mone_ng_loss_type = 'normalized' asks for the gates of all neurons, which the kernels of "
         "a captured layer do not keep",
         "set it to selected"),
        (scope == "global_batch" and args.mone_ng_loss_coeff > 0,
         "mone_ng_loss_scope = 'global_batch' adds up a step on the host",
         "set it to micro_batch"),
        (args.cuda_graph_warmup_steps < 1,
         "their tables come to the device in the first step, before a capture",
         "set --cuda-graph-warmup-steps to 1 or more"),
        (put_off and kind != FULL_ITERATION,
         "the weight gradients that they put off are made by the host",
         "leave out --delay-wgrad-compute and --overlap-dispatch-backward-with-experts-wgrad"),
        (recomputed, "a recomputed layer takes the neurons of its first pass from the host",
         "recompute other modules than moe"),
        (kind == FULL_ITERATION and args.check_for_spiky_loss,
         "check_for_spiky_loss waits for each loss", "leave it out"),
    ]  # fmt: skip
