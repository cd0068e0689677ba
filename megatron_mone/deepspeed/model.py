"""The model in DeepSpeed's hands, with the surface of Megatron's DDP wrapper.

Until the optimizer is made it is a plain wrapper; `start` then hands its module to
`deepspeed.initialize`. May touch: DeepSpeed, hooks of parameters.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from megatron_mone.common.patch import Replaced
from megatron_mone.deepspeed.groups import MegatronGroups, mark_experts
from megatron_mone.deepspeed.package import init_distributed, package
from megatron_mone.deepspeed.settings import settings_of

# Attributes of the model's config, which the schedule has at hand.
_ENGINE = "deepspeed_engine"
_SETTINGS = "deepspeed_settings"


class EngineModel(DistributedDataParallel):
    """One model, whose gradients DeepSpeed reduces.

    Megatron knows its wrappers by class (unwrap_model), so this is one; of its code nothing runs.

    Args:
        config: of the model.
        ddp_config: as Megatron makes it; the optimizer reads what is sharded there: nothing.
        module: the model, in Float16Module with bf16.
        pg_collection: of the run.
    """

    def __init__(
        self, config: TransformerConfig, ddp_config: DistributedDataParallelConfig,
        module: torch.nn.Module, pg_collection: ProcessGroupCollection,
    ) -> None:  # fmt: skip
        _BaseDataParallel.__init__(self, config=config, module=module)
        self.ddp_config = ddp_config
        self.groups = pg_collection
        self.force_all_reduce = False
        # Gradient buffers, of which there are none; Megatron looks for them, at a stop too.
        self.buffers: Any = []
        self.expert_parallel_buffers: list = []
        self.bucket_groups: list = []
        self.expert_parallel_bucket_groups: list = []
        init_distributed()
        self.has_experts = mark_experts(module.parameters(), pg_collection)
        self.engine: Any = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Through DeepSpeed's engine, whose hooks find the backward pass."""
        return (self.module if self.engine is None else self.engine)(*inputs, **named)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Nothing: DeepSpeed reduces when its step comes (ZeRO 0, 1) or in every backward pass."""
        yield

    def start_grad_sync(self, *unused: Any, **named: Any) -> None:
        """DeepSpeed's."""

    def finish_grad_sync(self, *unused: Any, **named: Any) -> None:
        """DeepSpeed's."""

    def zero_grad_buffer(self) -> None:
        """DeepSpeed's, after a step."""

    def scale_gradients(self, scaling_factor: Any) -> None:
        """Not called: a loss by token is refused."""
        raise NotImplementedError

    def broadcast_params(self) -> None:
        """DeepSpeed's, at its start."""

    def start(self, optimizer: torch.optim.Optimizer, args: Namespace) -> Any:
        """Hand the model and a plain optimizer to DeepSpeed.

        Args:
            optimizer: of the module's parameters.
            args: Megatron's.

        Returns:
            The DeepSpeedEngine, also found from the model's config (`engine_of`).
        """
        _sum_over_tensor_ranks(self.module, self.config, self.groups)
        with _experts_known(self.has_experts):
            self.engine, *_ = package().initialize(
                model=self.module, optimizer=optimizer,
                config=getattr(self.config, _SETTINGS, None) or settings_of(args),
                mpu=MegatronGroups(self.groups), dist_init_required=False,
            )  # fmt: skip
        setattr(self.config, _ENGINE, self.engine)
        return self.engine


def start_with(config: Any, settings: dict[str, Any]) -> None:
    """Let DeepSpeed start with `settings` for the model of a config, whatever the flags say: a
    planner's step has fewer micro-batches than the run's JSON may name."""
    setattr(config, _SETTINGS, settings)


def engine_of(config: Any) -> Any:
    """The DeepSpeedEngine that steps the model of a config; None: Megatron does."""
    return getattr(config, _ENGINE, None)


@contextlib.contextmanager
def _experts_known(has_experts: bool) -> Iterator[None]:
    """DeepSpeed looks for layers of its own class; these are Megatron's and MoNE's."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    configure = DeepSpeedEngine._configure_distributed_model

    def configured(self: Any, model: torch.nn.Module) -> None:
        configure(self, model)
        self.has_moe_layers = has_experts

    with Replaced(DeepSpeedEngine, "_configure_distributed_model", configured):
        yield


def _sum_over_tensor_ranks(
    module: torch.nn.Module, config: TransformerConfig, groups: ProcessGroupCollection
) -> None:
    """Sum, over tensor-parallel ranks, gradients of whole parameters that each made of its part of
    the sequence or heads, before DeepSpeed sees them.

    As megatron/core/distributed/finalize_model_grads.py: _allreduce_non_tensor_model_parallel_grads
    does after the last micro-batch, when ZeRO 2 and 3 have already cut them.
    """
    if groups.tp.size() == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        return summed_over(groups.tp, gradient)

    def averaged(gradient: Tensor) -> Tensor:
        return summed_over(groups.tp, gradient) / groups.tp.size()

    for name, parameter in module.named_parameters():
        if getattr(parameter, "average_gradients_across_tp_domain", False):
            parameter.register_hook(averaged)
        elif _is_partial(name, parameter, config):
            parameter.register_hook(summed)


def summed_over(group: torch.distributed.ProcessGroup, gradient: Tensor) -> Tensor:
    """The sum of a gradient over ranks; of its shape."""
    whole = gradient.contiguous().clone()
    torch.distributed.all_reduce(whole, group=group)
    return whole


def _is_partial(name: str, parameter: Parameter, config: TransformerConfig) -> bool:
    of_heads = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
    return (config.sequence_parallel and getattr(parameter, "sequence_parallel", False)) or of_heads
