"""Floating-point operations of one training step, executed and active.

Built on Megatron's own count of the dense model; only the routed experts of MoNE layers differ.
Symbols as in MONE.md: N routed rows, H hidden, F neurons of an expert, r the kept ratio.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_mone.config import backend_of, layer_pattern, neurons_per_token
from megatron_mone.kernels.cpu.route import computes_all


def step_flops(args: Namespace, config: Any, batch_size: int) -> tuple[float, float]:
    """(executed, active) operations of one optimizer step over all ranks.

    Executed counts what the backend runs, active what the kept neurons need: a dense expert takes
    9 N H F multiply-adds forward and backward, MoNE N H F (1 + 8 r). The reference backend computes
    every neuron, so it executes the dense count; the cpu backend computes the kept ones, unless
    GEMMs over all are faster (kernels/cpu/route.py).

    Args:
        args: Megatron's arguments.
        config: the transformer config; with mone_* fields set for a MoNE model.
        batch_size: samples in the step.
    """
    from megatron.training.training import num_floating_point_operations

    executed = float(num_floating_point_operations(args, batch_size))
    if not getattr(config, "mone_enabled", False):
        return executed, executed
    layers = layer_pattern(config).count(2)
    if config.mtp_num_layers and layer_pattern(config)[-1] == 2:
        layers += config.mtp_num_layers
    rows = batch_size * args.seq_length * config.moe_router_topk
    width = config.moe_ffn_hidden_size
    ratio = neurons_per_token(config) / width
    saved_madds = layers * rows * config.hidden_size * width * 8.0 * (1.0 - ratio)
    active = executed - 2.0 * saved_madds
    sparse = backend_of(config) == "cpu" and not computes_all(ratio, config.params_dtype)
    return (active if sparse else executed), active
