"""The norm of all gradients by which DeepSpeed clips, each parameter counted once.

DeepSpeed averages the norms of experts over ranks, and asks attributes that Megatron's layers do
not set which parameters are copies. Here every rank sums the squares of the pieces that it alone
holds, or its share of what several hold, and one all-reduce over all ranks adds them up. May touch:
methods of one engine's optimizer.
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor
from torch.nn import Parameter

from megatron_mone.common.phases import CLIPPING, OPTIMIZER, enter
from megatron_mone.deepspeed.groups import copies


def count_once(engine: Any, groups: ProcessGroupCollection, clip: float) -> None:
    """Have an engine measure, and clip by, the norm that Megatron's optimizers have.

    Args:
        engine: DeepSpeed's, started.
        groups: of the run.
        clip: the largest norm; 0: gradients stay as they are.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()

    def squares(pieces: Iterable[tuple[Tensor, Parameter]], *, cut: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=engine.device)
        for gradient, parameter in pieces:
            if param_is_not_tensor_parallel_duplicate(
                parameter, tp_group=groups.tp, expert_tp_group=groups.expt_tp
            ):
                square = torch.linalg.vector_norm(gradient.float()).square()
                total += square if cut else square / copies(parameter, groups)
        torch.distributed.all_reduce(total)
        return total.sqrt()

    if stage == 0 or hasattr(optimizer, "fp32_groups_gradients"):
        step, optimizer.clip_grad = optimizer.step, 0.0

        def clipped(*given: Any, **named: Any) -> None:
            enter(CLIPPING)
            norm = squares(_whole(engine), cut=False)
            _clip(engine, norm, clip)
            enter(OPTIMIZER)
            step(*given, **named)
            optimizer._global_grad_norm = norm

        optimizer.step = clipped
        engine.clip_fp32_gradients = lambda: None  # by a norm of its own, before the step
    else:
        groups_of = optimizer.fp16_groups if stage == 3 else optimizer.params_in_partition
        pieces = _norms if engine.zero_cpu_offload() else _pieces

        def counted(norm_type: int = 2) -> Tensor:
            return squares(pieces(optimizer, groups_of), cut=True)

        optimizer.scaled_global_norm = counted
        optimizer._get_norm_groups = lambda: [counted()]  # ZeRO 3's name


def _whole(engine: Any) -> Iterable[tuple[Tensor, Parameter]]:
    """Gradients that are whole on every rank: ZeRO 0, and 1 with bf16 weights."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups_gradients"):
        return ((one.grad, one) for one in engine.module.parameters() if one.grad is not None)
    pairs = zip(optimizer.fp32_groups_gradients, optimizer.bf16_groups, strict=True)
    return (pair for gradients, group in pairs for pair in zip(gradients, group, strict=True))


def _pieces(optimizer: Any, parameters: Any) -> Iterable[tuple[Tensor, Parameter]]:
    """What a rank has of each gradient, without the zeros that fill its part up."""
    for number, group in enumerate(parameters):
        held = optimizer.averaged_gradients[number]
        held = [one for one in held if not getattr(one, "_zero_padding", False)]
        yield from zip(held, group, strict=False)


def _norms(optimizer: Any, parameters: Any) -> Iterable[tuple[Tensor, Parameter]]:
    """The norms of those that went to the host."""
    for group in parameters:
        for one in group:
            if (
                norm := optimizer.norm_for_param_grads.get(optimizer.get_param_id(one))
            ) is not None:
                yield torch.as_tensor(norm), one


def _clip(engine: Any, norm: Tensor, clip: float) -> None:
    if clip and (scale := clip / (float(norm) + 1e-6)) < 1:
        for gradient, _ in _whole(engine):
            gradient.mul_(scale)
