"""Operations of a step over all ranks, executed and active, for the training log.

Megatron's own count of the dense model, less what the experts of MoNE layers do not compute
(module_flops.py, whose counts by rank and module also hold the router, whole attention scores and
recompute). Known before the first step: rows and kept neurons are what the config promises.
"""

from argparse import Namespace
from typing import Any

from megatron_mone.config import layer_pattern, neurons_per_token
from megatron_mone.config_checks import hybrid_moe_layers
from megatron_mone.model.module_flops import LayerShare, RankShare, expert_work
from megatron_mone.moe.metrics import MoNEMetricsTracker


def step_flops(args: Namespace, config: Any, batch_size: int) -> tuple[float, float]:
    """(executed, active) operations of one optimizer step over all ranks.

    Executed counts what the backend runs, active what the kept neurons need: a dense expert takes
    9 N H F multiply-adds forward and backward, MoNE N H F (1 + 8 r).

    Args:
        args: Megatron's arguments.
        config: the transformer config; with mone_* fields set for a MoNE model.
        batch_size: samples in the step.
    """
    from megatron.training.training import num_floating_point_operations

    dense = float(num_floating_point_operations(args, batch_size))
    if not getattr(config, "mone_enabled", False):
        return dense, dense
    pattern = layer_pattern(config)
    predicting = (config.mtp_num_layers or 0) * (pattern[-1] == 2)
    if getattr(args, "hybrid_layer_pattern", None) is not None:
        experts = hybrid_moe_layers(args.hybrid_layer_pattern)
        pattern = [kind * is_moe for kind, is_moe in zip(pattern, experts, strict=True)]
        last = next((kind for kind in reversed(pattern) if kind), 0)
        predicting = args.hybrid_layer_pattern.partition("/")[2].count("E") * (last == 2)
    layers = pattern.count(2) + predicting
    tokens = batch_size * args.seq_length
    rows = tokens * config.moe_router_topk
    share = RankShare(
        layers=(), output_uses=0, micro_batches=1, tokens=tokens, sequence_length=args.seq_length,
        tp=1, etp=1, vocabulary=0, local_experts=config.num_moe_experts,
    )  # fmt: skip
    of_mone = _total(config, share, LayerShare("mone", rows, rows * neurons_per_token(config)))
    of_stock = _total(config, share, LayerShare("moe", rows))
    executed, active = (layers * (m - s) for m, s in zip(of_mone, of_stock, strict=True))
    return dense + executed, dense + active


def follow_training(tracker: MoNEMetricsTracker, transformer: Any) -> None:
    """Log as often as Megatron does, with its timers, where a stock script brought no settings.

    Args:
        tracker: of the process.
        transformer: the model's TransformerConfig, with mone_* fields.
    """
    from megatron.training import global_vars

    args = global_vars._GLOBAL_ARGS  # None where a model is built outside a training script
    if tracker.step_flops is not None or args is None:
        return
    tracker.log_interval = args.log_interval
    tracker.step_flops = lambda: step_flops(args, transformer, args.global_batch_size)
    tracker.interval_seconds = lambda: global_vars.get_timers()("interval-time").elapsed(
        reset=False
    )


def _total(config: Any, share: RankShare, layer: LayerShare) -> tuple[float, float]:
    works = expert_work(config, share, layer).values()
    return sum(work.executed for work in works), sum(work.active for work in works)
