"""Where DeepSpeed comes into Megatron's training: places that stay as they are for a run
that Megatron's own engine steps.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mone.checkpoint.optimizer_layout import BY_PARAMETER, SHARDING
from megatron_mone.common.patch import Replaced, wrapping
from megatron_mone.deepspeed.settings import is_deepspeed


def _wrapped(wrap: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.training import get_args

    @functools.wraps(wrap)
    def wrapped(
        chunks: list, random_init: bool, ddp_config: Any, *given: Any, pg_collection: Any,
        **named: Any,
    ) -> list:  # fmt: skip
        if not is_deepspeed(get_args()):
            return wrap(
                chunks, random_init, ddp_config, *given, pg_collection=pg_collection, **named
            )
        from megatron_mone.deepspeed.model import EngineModel

        return [EngineModel(one.config, ddp_config, one, pg_collection) for one in chunks]

    return wrapped


def _made(make: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.training import get_args

    @functools.wraps(make)
    def made(config: Any, model: list, *given: Any, **named: Any) -> Any:
        if not is_deepspeed(get_args()):
            return make(config, model, *given, **named)
        from megatron_mone.deepspeed.optimizer import EngineOptimizer

        return EngineOptimizer(lambda: make(config, model, *given, **named), model[0], get_args())

    return made


def _backward(backward_step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(backward_step)
    def backward(
        input_tensor: Any, output_tensor: Any, output_tensor_grad: Any, config: Any
    ) -> Any:
        from megatron_mone.deepspeed.model import engine_of

        if (engine := engine_of(config)) is None:
            return backward_step(input_tensor, output_tensor, output_tensor_grad, config)
        loss = output_tensor[0] if isinstance(output_tensor, list) else output_tensor
        if config.timers is not None:
            config.timers("backward-compute", log_level=2).start()
        engine.backward(loss, scale_wrt_gas=False)
        if config.timers is not None:
            config.timers("backward-compute").stop()
        return None

    return backward


def _finalized(finalize: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(finalize)
    def finalized(model: list, *given: Any, **named: Any) -> Any:
        from megatron_mone.deepspeed.model import EngineModel

        if not isinstance(model[0], EngineModel):
            return finalize(model, *given, **named)
        name = "_allreduce_non_tensor_model_parallel_grads"  # hooks have done it
        with Replaced(sys.modules[finalize.__module__], name, lambda *ignored: None):
            return finalize(model, *given, **named)

    return finalized


def _engine_among(given: tuple[Any, ...]) -> Any:
    """The engine of the model that a call of Megatron's was given; None: it has none."""
    models = [one[0] for one in given if isinstance(one, list) and one]
    return next((one.engine for one in models if getattr(one, "engine", None) is not None), None)


def _whole(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(checkpoint)
    def whole(*given: Any, **named: Any) -> Any:
        if (engine := _engine_among(given)) is None:
            return checkpoint(*given, **named)
        from megatron_mone.deepspeed.state import whole_parameters

        with whole_parameters(engine):
            return checkpoint(*given, **named)

    return whole


def _saved(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save_checkpoint)
    def saved(iteration: int, *given: Any, **named: Any) -> Any:
        from megatron.training import get_args

        done = save_checkpoint(iteration, *given, **named)
        engine, args = _engine_among(given), get_args()
        if engine is not None and args.save_deepspeed:
            from megatron_mone.deepspeed import folders

            folders.save(engine, Path(args.save_deepspeed), args, iteration)
        return done

    return saved


def _started(setup: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(setup)
    def started(*given: Any, **named: Any) -> Any:
        from megatron.training import get_args

        model, optimizer, schedule = setup(*given, **named)
        args = get_args()
        if is_deepspeed(args) and args.load_deepspeed and not args.iteration:
            from megatron_mone.deepspeed import folders

            args.iteration, args.consumed_train_samples = folders.load(
                model[0].engine, Path(args.load_deepspeed)
            )
            schedule.step(increment=args.consumed_train_samples)
        return model, optimizer, schedule

    return started


def _described(describe: Callable[..., dict]) -> Callable[..., dict]:
    @functools.wraps(describe)
    def described(args: Any, *given: Any, **named: Any) -> dict:
        metadata = describe(args, *given, **named)
        if is_deepspeed(args):
            metadata[SHARDING] = BY_PARAMETER
        return metadata

    return described


PATCHES = (
    wrapping(
        "deepspeed-model", "megatron.training.models.dist_utils: _ddp_wrap", _wrapped,
        why="Megatron's wrapper has gradient buffers of its own; DeepSpeed keeps gradients itself",
        needed_while="def _ddp_wrap(",
    ),
    wrapping(
        "deepspeed-optimizer", "megatron.training.training: get_megatron_optimizer", _made,
        why="the optimizer is DeepSpeed's, of Megatron's parameter groups",
        needed_while="optimizer = get_megatron_optimizer(",
    ),
    wrapping(
        "deepspeed-backward", "megatron.core.pipeline_parallel.schedules: backward_step", _backward,
        why="DeepSpeed reduces gradients in its own backward pass",
        needed_while="torch.autograd.backward(output_tensor[0]",
    ),
    wrapping(
        "deepspeed-checkpoint", "megatron.training.training: save_checkpoint, load_checkpoint",
        _whole,
        why="ZeRO 3 leaves no rank a whole parameter",
        needed_while="load_checkpoint(\n",
    ),
    wrapping(
        "deepspeed-folder-out", "megatron.training.training: save_checkpoint", _saved,
        why="DeepSpeed writes its own form itself, of parameters that are cut again",
        needed_while="    save_checkpoint(\n",
    ),
    wrapping(
        "deepspeed-folder", "megatron.training.training: setup_model_and_optimizer", _started,
        why="a folder of DeepSpeed's is loaded by its engine, once that is there",
        needed_while="def setup_model_and_optimizer(",
    ),
    wrapping(
        "deepspeed-metadata",
        "megatron.training.checkpointing: _build_sharded_state_dict_metadata", _described,
        why="a distributed optimizer goes by it when it loads what this engine saved",
        needed_while="distrib_optim_sharding_type",
    ),
    wrapping(
        "deepspeed-finalize", "megatron.training.training: finalize_model_grads", _finalized,
        why="gradients of whole parameters are summed before DeepSpeed cuts them",
        needed_while="config.finalize_model_grads_func = finalize_model_grads",
    ),
)  # fmt: skip
