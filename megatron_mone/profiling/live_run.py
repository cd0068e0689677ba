"""LiveRun: one of several models that train in turn in one process, on the same tokens.

Megatron keeps the arguments and the MoE metrics tracker in globals; a run puts its own there before
every step. Process groups, timers and the micro-batch calculator are shared, so all runs have one
layout (baselines.LAYOUT). May touch: Megatron's training functions and those globals.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.core.utils import get_model_config
from megatron.training import global_vars, initialize, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

from megatron_mone.model.gpt_training import datasets_provider, forward_step
from megatron_mone.moe.experts import backend_of
from megatron_mone.moe.layer import MoNELayer
from megatron_mone.moe.metrics import MoNEMetricsTracker
from megatron_mone.profiling.baselines import RunSpec
from megatron_mone.profiling.deepspeed_moe import BACKEND, DeepSpeedMoE
from megatron_mone.profiling.instrument import moe_layers
from megatron_mone.profiling.run_meter import Run

Data = Callable[[Namespace, int], Any]


@dataclass
class LiveRun:
    """A model, its optimizer and its own reader of the shared data.

    Attributes:
        run: what is measured.
        iteration: steps taken.
    """

    run: Run
    scheduler: Any
    iterator: Any
    config: Any
    tracker: MoNEMetricsTracker
    schedule: Any
    iteration: int = 0

    def step(self) -> None:
        """One optimizer step, as Megatron's training loop makes it."""
        training.train_step(
            forward_step,
            self.iterator,
            self.run.model,
            self.run.optimizer,
            self.scheduler,
            self.config,
            self.schedule,
            iteration=self.iteration,
        )

    def enter(self) -> None:
        """Make this run the one that Megatron's globals speak of; before a step."""
        global_vars.set_args(self.run.args)
        self.run.args.curr_iteration = self.iteration
        set_moe_metrics_tracker(self.tracker)

    def leave(self) -> None:
        """After a step: what Megatron's loop does in `training_log`, without the log."""
        self.iteration += 1
        self.run.args.consumed_train_samples += self.run.args.global_batch_size
        for layer in moe_layers(self.run.model):
            if isinstance(layer, MoNELayer):
                layer.end_step()
        self.tracker.clear()


def build_run(
    spec: RunSpec, args: Namespace, model_config: Any, data: Data | None = None
) -> LiveRun:
    """Build a run in a process where Megatron is initialised; collective over all ranks.

    Args:
        spec: its name.
        args: validated arguments.
        model_config: of `model_config_of`.
        data: what is trained on, of the arguments and the number of model chunks; the training
            data when None.
    """
    tracker = MoNEMetricsTracker()
    global_vars.set_args(args)
    set_moe_metrics_tracker(tracker)
    initialize._set_random_seed(args.seed, args.data_parallel_random_init)  # the same weights
    model, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, model_config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.train()
    config = get_model_config(model[0])
    _prepare(config, args, model, optimizer)
    return LiveRun(
        run=Run(spec.name, args, model, optimizer, experts_backend(model)),
        scheduler=scheduler,
        iterator=(data or training_data)(args, len(model)),
        config=config,
        tracker=tracker,
        schedule=get_forward_backward_func(),
        iteration=args.iteration,
    )


def model_config_of(spec: RunSpec, args: Namespace) -> Any:
    """The GPTModelConfig of a run.

    Raises:
        ValueError: the model does not fit.
    """
    from megatron_mone.model.config_builder import build_model_config
    from megatron_mone.profiling.deepspeed_moe import check_deepspeed_moe, deepspeed_moe_layer_spec
    from megatron_mone.profiling.grouped_mm_model import check_grouped_mm, grouped_mm_layer_spec

    if not (spec.grouped_mm or spec.deepspeed_moe):
        return build_model_config(args)
    if spec.deepspeed_moe:
        check_deepspeed_moe(args)
    elif args.hybrid_layer_pattern is not None:
        raise ValueError(
            f"baseline grouped_mm stands in GPT models alone (hybrid_layer_pattern = "
            f"{args.hybrid_layer_pattern!r}): leave it out"
        )
    config = gpt_config_from_args(args)
    if spec.deepspeed_moe:
        config.transformer_layer_spec = deepspeed_moe_layer_spec
    else:
        check_grouped_mm(config.transformer)
        config.transformer_layer_spec = grouped_mm_layer_spec
    return config


def _prepare(config: Any, args: Namespace, model: list, optimizer: Any) -> None:
    """What `training.train` sets on the config before its first step."""
    config.grad_scale_func = optimizer.scale_loss
    config.timers = global_vars.get_timers()
    if args.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in model])
        if args.align_grad_reduce:
            config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in model])
    if args.overlap_param_gather and args.align_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in model])
    if config.finalize_model_grads_func is None:
        config.finalize_model_grads_func = training.finalize_model_grads  # as patched


def _one_or_all(functions: list) -> Any:
    return functions[0] if len(functions) == 1 else functions


def training_data(args: Namespace, chunks: int) -> Any:
    """The training data; a reader for each model chunk with interleaved pipelines."""
    if args.virtual_pipeline_model_parallel_size is None:
        return training.build_train_valid_test_data_iterators(datasets_provider)[0]
    readers = []
    for vp_stage in range(chunks):
        provider = functools.partial(datasets_provider, vp_stage=vp_stage)
        provider.is_distributed = True  # type: ignore[attr-defined]
        readers.append(training.build_train_valid_test_data_iterators(provider)[0])
    return readers


def experts_backend(model: Sequence[Any]) -> str:
    """What computes the routed experts: a MoNE backend, or the class of the stock experts.

    Collective, so that pipeline stages without experts name it too; "none" in a model without.
    """
    layers, name = moe_layers(model), None
    if layers:
        name = type(layers[0].experts).__name__
        if isinstance(layers[0], DeepSpeedMoE):
            name = BACKEND
        elif isinstance(layers[0], MoNELayer):
            name = backend_of(layers[0].config)
    names: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, name)
    return next((found for found in names if found), "none")
