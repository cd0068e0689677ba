"""Before a model is built: does a checkpoint choose neurons as this run does? May touch: the
checkpoint, read-only."""

import io
from argparse import Namespace
from pathlib import Path

import torch

from megatron_mone.checkpoint.safe_metadata import loading_weights_only, read_metadata
from megatron_mone.moe.stored_choice import CHOICE, Choice, check_choice


def check_stored_choice(folder: Path, args: Namespace) -> None:
    """Compare what a checkpoint says of its experts with a run; no word of it, no opinion.

    Args:
        folder: of the iteration.
        args: Megatron's, validated.

    Raises:
        ValueError: as `check_choice`.
    """
    choice = saved_choice(folder)
    if choice is not None:
        check_choice(choice, args, f"checkpoint {folder}")


def saved_choice(folder: Path) -> Choice | None:
    """What the experts of a torch_dist checkpoint choose; None: of stock keys, or not readable."""
    from torch.distributed.checkpoint import FileSystemReader, load

    try:
        metadata = read_metadata(folder)
        keys = () if metadata is None else metadata.state_dict_metadata
        key = next((key for key in keys if f".{CHOICE}/" in key), None)
        if key is None:
            return None
        found: dict[str, object] = {key: io.BytesIO()}
        with loading_weights_only():
            load(found, storage_reader=FileSystemReader(folder), no_dist=True)
        held = found[key]
        if isinstance(held, io.BytesIO):
            held.seek(0)
            held = torch.load(held, weights_only=True)
        return dict(held[0])  # type: ignore[index]
    except Exception:  # damaged: `verify_load` says so, and what is whole
        return None
