"""Before a model is built: does a checkpoint choose neurons as this run does? And before one is
filled from Megatron FSDP's format, whose load passes over what it does not find. May touch: the
checkpoint, read-only; Megatron's load."""

import functools
import io
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mone.checkpoint.safe_metadata import loading_weights_only, read_metadata
from megatron_mone.common.patch import wrapping
from megatron_mone.config_checks import is_mone
from megatron_mone.moe.stored_choice import CHOICE, Choice, check_choice, model_of


def check_stored_choice(folder: Path, args: Namespace, model: Any = None) -> None:
    """Compare what a checkpoint says of its experts with a run; no word of it, no opinion, unless
    its experts cannot be MoNE's.

    Args:
        folder: of the iteration.
        args: Megatron's, validated.
        model: of the run, as of `check_choice`; its arguments by default.

    Raises:
        ValueError: as `check_choice`; or experts of stock Megatron in fsdp_dtensor.
    """
    choice, model = saved_choice(folder), args if model is None else model
    if choice is not None:
        check_choice(choice, model, f"checkpoint {folder}")
    elif args.use_megatron_fsdp and is_mone(model) and _keys(folder):
        raise ValueError(
            f"checkpoint {folder} holds no experts that choose neurons, and in fsdp_dtensor those "
            "of stock Megatron lie otherwise: they would stay as they were made. Give a --load of "
            "MoNE's"
        )


def saved_choice(folder: Path) -> Choice | None:
    """What the experts of a checkpoint choose; None: of stock keys, or not readable."""
    from torch.distributed.checkpoint import FileSystemReader, load

    try:
        key = next((k for k in _keys(folder) if f".{CHOICE}/" in k or k.endswith(CHOICE)), None)
        if key is None:
            return None
        found: dict[str, object] = {key: io.BytesIO()}
        reader = FileSystemReader(folder)
        reader.read_metadata = lambda *_of, **_n: read_metadata(folder)  # type: ignore[method-assign]
        with loading_weights_only():
            load(found, storage_reader=reader, no_dist=True)
        held = found[key]
        if isinstance(held, str):
            return dict(json.loads(held))
        if isinstance(held, io.BytesIO):
            held.seek(0)
            held = torch.load(held, weights_only=True)
        return dict(held[0])  # type: ignore[index]
    except Exception:  # damaged: `verify_load` says so, and what is whole
        return None


def _keys(folder: Path) -> tuple[str, ...]:
    """Of the checkpoint's entries; none where it is of another format or damaged."""
    try:
        metadata = read_metadata(folder)
    except ValueError:
        return ()
    return () if metadata is None else tuple(metadata.state_dict_metadata)


def _asked(load: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.training.checkpointing import CheckpointType

    @functools.wraps(load)
    def loaded(load_dir: Any, args: Namespace, *rest: Any, **named: Any) -> Any:
        state, folder, release, kind = load(load_dir, args, *rest, **named)
        model = model_of(args)
        if kind is CheckpointType.FSDP_DTENSOR and named.get("rank0") and model is not None:
            check_stored_choice(Path(folder), args, model)
        return state, folder, release, kind

    return loaded


PATCHES = (
    wrapping(
        "choice-of-shards",
        "megatron.training.checkpointing: _load_base_checkpoint",
        _asked,
        why="experts whose keys are not in a checkpoint of fsdp_dtensor are left as they were made",
        needed_while="allow_partial_load = not getattr(args, 'strict_fsdp_dtensor_load', False)",
    ),
)
