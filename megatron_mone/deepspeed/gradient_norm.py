"""The norm of all gradients by which DeepSpeed clips, each parameter counted once.

DeepSpeed averages the norms of experts over ranks, and asks attributes that Megatron's layers do
not set which parameters are copies. Here every rank sums the squares of the pieces that it alone
holds, or its share of what several hold, and one all-reduce over all ranks adds them up. May touch:
methods of one engine's optimizer.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor
from torch.nn import Parameter

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

    if stage == 0:
        optimizer.register_step_pre_hook(
            lambda *ignored: _clip(engine, squares(_whole(engine), cut=False), clip)
        )
    elif stage == 3:
        optimizer._get_norm_groups = lambda: [
            squares(_pieces(optimizer.averaged_gradients, optimizer.fp16_groups), cut=True)
        ]
    else:
        optimizer.scaled_global_norm = lambda norm_type=2: squares(
            _pieces(optimizer.averaged_gradients, optimizer.params_in_partition), cut=True
        )


def _whole(engine: Any) -> Iterable[tuple[Tensor, Parameter]]:
    return ((one.grad, one) for one in engine.module.parameters() if one.grad is not None)


def _pieces(gradients: Any, parameters: Any) -> Iterable[tuple[Tensor, Parameter]]:
    """What a rank has of each gradient, without the zeros that fill its part up."""
    for number, group in enumerate(parameters):
        held = [one for one in gradients[number] if not getattr(one, "_zero_padding", False)]
        yield from zip(held, group, strict=False)


def _clip(engine: Any, norm: Tensor, clip: float) -> None:
    engine.optimizer._global_grad_norm = norm
    if clip and (scale := clip / (float(norm) + 1e-6)) < 1 and math.isfinite(scale):
        for gradient, _ in _whole(engine):
            gradient.mul_(scale)
