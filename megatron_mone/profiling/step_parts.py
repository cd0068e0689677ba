"""What an engine does of a step beside the model: where it reduces gradients, clips by their norm
and gathers parameters, by the names that the profiler wraps. Touches nothing.

DeepSpeed reduces gradients in hooks of the backward pass (ZeRO 2 and 3) or as its step begins (ZeRO
0 and 1); it gathers parameters as its step ends (ZeRO 1 and 2), or around every module, forward and
back (ZeRO 3). Megatron FSDP reduces and gathers in hooks too, or as the step ends.
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import optimizer as megatron_optimizer

from megatron_mone.common.phases import CLIPPING, GRAD_REDUCE, PARAMETER_GATHER
from megatron_mone.deepspeed import model

Part = tuple[Any, str, str]
"""Owner, name of its function, phase."""

BUCKETS = param_and_grad_buffer._ParamAndGradBucketGroup
GRAD_SYNC = ("start_grad_sync", "finish_grad_sync")
_GATHERING = ("deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.bf16_optimizer")
_OF_ENGINE = {"allreduce_gradients": GRAD_REDUCE}
_OF_OPTIMIZER = {
    "process_gradients": GRAD_REDUCE,  # in hooks: ZeRO 1 and 2
    "reduce_ready_partitions_and_remove_grads": GRAD_REDUCE,  # in hooks: ZeRO 3
    "finalize_gradient_accumulation_boundary": GRAD_REDUCE,
    "scaled_global_norm": CLIPPING,
    "_get_norm_groups": CLIPPING,
    "unscale_and_clip_grads": CLIPPING,
    "_post_step": PARAMETER_GATHER,  # ZeRO 3: of parameters too small to be let go of
}
_AROUND_MODULES = tuple(
    f"{when}_sub_module_{pass_}_function" for when in ("pre", "post")
    for pass_ in ("forward", "backward")
)  # fmt: skip


def step_parts(optimizer: Any, model: Sequence[Any]) -> Iterator[Part]:
    """The parts of a run's engine.

    Args:
        optimizer: Megatron's, or the one that steps by DeepSpeed.
        model: chunks, as Megatron wrapped them.
    """
    engine = getattr(optimizer, "engine", None)
    yield from _of_megatron() if engine is None else _of_deepspeed(engine)
    if any(hasattr(chunk, "param_and_grad_buffer") for chunk in model):
        yield from _of_fsdp()


def _of_megatron() -> Iterator[Part]:
    for name in GRAD_SYNC:
        yield BUCKETS, name, GRAD_REDUCE
    for name in ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32"):
        yield megatron_optimizer, name, CLIPPING
    for name in ("start_param_sync", "finish_param_sync"):
        yield BUCKETS, name, PARAMETER_GATHER


def _of_fsdp() -> Iterator[Part]:
    own = "megatron.core.distributed.fsdp.src.megatron_fsdp"
    wrapper = importlib.import_module(f"{own}.megatron_fsdp").MegatronFSDP
    buffers = importlib.import_module(f"{own}.param_and_grad_buffer")
    yield wrapper, "all_gather_and_wait_parameters_ready", PARAMETER_GATHER  # around modules
    yield wrapper, "start_param_sync", PARAMETER_GATHER  # as the step ends
    yield buffers.GradReducePipeline, "reduce_gradients", GRAD_REDUCE  # in hooks
    yield wrapper, "synchronize_gradient_reduce", GRAD_REDUCE  # as the last pass ends


def _of_deepspeed(engine: Any) -> Iterator[Part]:
    own = engine.optimizer
    yield model, "summed_over", GRAD_REDUCE
    for owner, names in ((engine, _OF_ENGINE), (own, _OF_OPTIMIZER)):
        for name, phase in names.items():
            if hasattr(owner, name):
                yield owner, name, phase
    for module in _GATHERING:
        yield importlib.import_module(module), "all_gather_dp_groups", PARAMETER_GATHER
    if (around := getattr(own, "parameter_offload", None)) is not None:
        for name in _AROUND_MODULES:
            yield around, name, PARAMETER_GATHER
