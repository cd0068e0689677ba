"""DeepSpeed's own checkpoint folders in and out: for its tools, and for runs that were its.

A folder holds `latest` and, for each tag, the model of each tensor-parallel rank and a piece of the
optimizer state for each data-parallel one. They are pickles: only tensors, numbers and DeepSpeed's
few classes of numbers are taken from them. May touch: the folder, DeepSpeed's engine.
"""

import contextlib
import functools
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_mone.checkpoint.verify import CheckpointRefusedError
from megatron_mone.common.files import atomic_write
from megatron_mone.common.patch import Replaced
from megatron_mone.deepspeed import state
from megatron_mone.deepspeed.settings import LATEST, tag_of

_TAG = "global_step{}"
_CARRIED = ("params", "step")  # of a group, what a checkpoint says and the flags do not
_ITERATION, _SAMPLES = "iteration", "consumed_train_samples"  # of what a run adds


def save(engine: Any, folder: Path, args: Namespace, iteration: int) -> None:
    """Write a checkpoint as DeepSpeed does, under another name until it is whole. Collective.

    Args:
        engine: DeepSpeed's.
        folder: of all tags.
        args: Megatron's.
        iteration: last step.
    """
    tag = _TAG.format(iteration)
    aside = f".saving-{tag}"
    first = torch.distributed.get_rank() == 0
    if first:
        shutil.rmtree(folder / aside, ignore_errors=True)
    added = {_ITERATION: iteration, _SAMPLES: args.consumed_train_samples}
    with _as_parts_of_one_model(engine), _tensors_alone(engine):
        engine.save_checkpoint(str(folder), tag=aside, client_state=added, save_latest=False)
    if first:
        shutil.rmtree(folder / tag, ignore_errors=True)
        (folder / aside).rename(folder / tag)
        atomic_write(folder / LATEST, tag.encode())
    torch.distributed.barrier()


def load(engine: Any, folder: Path) -> tuple[int, int]:
    """Weights, moments and steps of the newest checkpoint. Collective.

    Returns:
        Its iteration, and samples that were trained on; those of another's run are 0.

    Raises:
        CheckpointRefusedError: DeepSpeed refuses it, or it holds what is not data; one line.
    """
    tag, universal = tag_of(folder)
    groups = [dict(group) for group in engine.basic_optimizer.param_groups]
    try:
        with (
            _data_alone(),
            _as_parts_of_one_model(engine),
            Replaced(engine, "load_universal_checkpoint", lambda: universal),
        ):
            path, added = engine.load_checkpoint(
                str(folder), tag=tag, load_lr_scheduler_states=False, custom_load_fn=_into
            )
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointRefusedError(
            f"load_deepspeed = {str(folder)!r}: {tag} cannot be loaded: {words}"
        ) from error
    if path is None:
        raise CheckpointRefusedError(f"load_deepspeed = {str(folder)!r}: {tag} was not found whole")
    for group, before in zip(engine.basic_optimizer.param_groups, groups, strict=True):
        # Of a universal checkpoint ZeRO 3 hands the first group's decay and all to every group.
        group.update({key: one for key, one in before.items() if key not in _CARRIED})
    state.part_steps(engine)
    return int(added.get(_ITERATION, engine.global_steps)), int(added.get(_SAMPLES, 0))


@contextlib.contextmanager
def _as_parts_of_one_model(engine: Any) -> Iterator[None]:
    """Without expert parallelism there is no file for each expert."""
    with Replaced(engine, "has_moe_layers", False):
        yield


@contextlib.contextmanager
def _tensors_alone(engine: Any) -> Iterator[None]:
    """Megatron's linears have entries without a value, at which DeepSpeed's tools stop."""
    whole = engine.module_state_dict

    def tensors(*given: Any, **named: Any) -> dict[str, Any]:
        return {key: one for key, one in whole(*given, **named).items() if one is not None}

    with Replaced(engine, "module_state_dict", tensors):
        yield


def _into(src: dict[str, Any], dst: torch.nn.Module) -> None:
    """Load a model with those entries again; another that is missing or too many is an error."""
    empty = {key: None for key, one in dst.state_dict().items() if one is None}
    dst.load_state_dict({**empty, **src})


@contextlib.contextmanager
def _data_alone() -> Iterator[None]:
    """DeepSpeed unpickles whatever a file says; here what builds tensors and numbers alone."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    read = functools.wraps(torch.load)(
        lambda *given, _load=torch.load, **named: _load(*given, **{**named, "weights_only": True})
    )
    with torch.serialization.safe_globals(known), Replaced(torch, "load", read):
        yield
