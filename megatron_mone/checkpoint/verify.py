"""Before anything is loaded: is the checkpoint whole, and if not, which earlier one is?

Runs on all ranks right after torch.distributed is set up and before the model is built. Each rank
looks at its share of the files, so a shared file system reads the checkpoint once, and all ranks
fail together. A checkpoint without integrity.json (a stock one) is loaded with no opinion. May
touch: checkpoint folders, read-only; Megatron's start-up function.
"""

import functools
import inspect
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner

from megatron_mone.checkpoint import ownership
from megatron_mone.checkpoint.integrity import SUMS_NAME, find_damage, read_sums
from megatron_mone.checkpoint.safe_metadata import forget_metadata, load_weights_only, read_metadata
from megatron_mone.checkpoint.tracker import (
    ITERATION_FORMAT,
    TRACKER_NAME,
    iteration_of,
    iterations,
    read_tracker,
)
from megatron_mone.common.patch import Patch, wrapping


def add_arguments(parser: ArgumentParser) -> None:
    """The flag that says how much is looked at before a load."""
    parser.add_argument_group(title="checkpoint checks").add_argument(
        "--ckpt-verify",
        choices=("checksums", "sizes", "off"),
        default="checksums",
        help="What is compared with integrity.json before a checkpoint is loaded: checksums reads "
        "every file once, spread over the ranks; sizes finds missing and truncated files only.",
    )


def folder_to_load(args: Namespace) -> Path | None:
    """The checkpoint folder that Megatron will load, None when it starts from random weights.

    Follows megatron/training/checkpointing.py: load_checkpoint and _load_base_checkpoint.

    Raises:
        ValueError: the tracker holds no iteration, or the folder is missing or half-written.
    """
    load = Path(args.load) if args.load else None
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if pretrained and (load is None or read_tracker(load) is None):
        load = Path(pretrained)
    if load is None or str(load).startswith("msc:"):
        return None
    text = read_tracker(load)
    if text is None and not args.ckpt_step:
        return None
    if text is not None and text != "release" and not text.isdigit():
        newest = next(iter(iterations(load)), None)
        fix = "delete it to start from random weights"
        if newest is not None:
            fix = f"write {_newest_whole(load) or newest} into it, an iteration that is there"
        raise ValueError(f"{load / TRACKER_NAME} holds {text!r}, not an iteration number: {fix}")
    name = "release" if text == "release" else _name(args.ckpt_step or int(text or 0))
    folder = load / name
    if not folder.is_dir():
        why = "--ckpt-step" if args.ckpt_step else TRACKER_NAME
        raise ValueError(f"checkpoint {folder} is missing though {why} names it: "
                         f"{_offer(load, _newest_whole(load), folder)}")  # fmt: skip
    marks = (".metadata", "metadata.json") if args.ckpt_format == "torch_dist" else (".metadata",)
    missing = next((mark for mark in marks if not (folder / mark).is_file()), None)
    unsummed = not (folder / SUMS_NAME).is_file()  # else `verify_load` finds what is missing
    if missing is not None and unsummed and not any(folder.glob("mp_rank_*")):
        raise ValueError(f"checkpoint file {folder / missing} is missing: "
                         f"{_offer(load, _newest_whole(load, below=folder), folder)}")  # fmt: skip
    return folder


def verify_load(args: Namespace) -> None:
    """Check what is to be loaded. Collective over all ranks; rank 0 names the folders.

    Raises:
        ValueError: on every rank: one line naming the file, what is wrong with it, and an earlier
            iteration that is whole.
    """
    plan: list[Any] = [None, None, []]
    if torch.distributed.get_rank() == 0:
        try:
            plan[0] = folder_to_load(args)
        except ValueError as error:
            plan[1] = str(error)
        else:
            plan[2] = _earlier_with_sums(plan[0]) if plan[0] else []
    folder, refusal, earlier = _from_rank_0(plan)
    if refusal is not None:
        raise ValueError(refusal)
    if folder is None:
        return
    sums = args.ckpt_verify == "checksums"
    damage = _damage(folder, sums) if args.ckpt_verify != "off" else None
    if damage is not None:
        load = folder.parent
        whole = next((i for i in earlier if _damage(load / _name(i), sums) is None), None)
        raise ValueError(f"{damage}: {_offer(load, whole, folder)}")
    refusal = None
    if torch.distributed.get_rank() == 0:
        try:
            read_metadata(folder)
        except ValueError as error:
            refusal = str(error)
    if not getattr(args, "upcycles", False):  # whose load asks again
        forget_metadata()
    (refusal,) = _from_rank_0([refusal])
    if refusal is not None:
        raise ValueError(refusal)


def _from_rank_0(values: list[Any]) -> list[Any]:
    torch.distributed.broadcast_object_list(values, src=0)
    return values


class CheckpointRefusedError(Exception):
    """One line, on every rank: the run can have a checkpoint folder not as it is, or not now."""


def _with_folders(initialize_megatron: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.training import get_args

    @functools.wraps(initialize_megatron)
    def with_folders(*args: Any, **kwargs: Any) -> Any:
        result = initialize_megatron(*args, **kwargs)
        try:
            ownership.take_together(ownership.run)  # first, lest what is still written is read
            verify_load(get_args())
        except ValueError as error:
            raise CheckpointRefusedError(str(error)) from error
        return result

    return with_folders


PATCHES = (
    wrapping(
        "start-up",
        "megatron.training.training: initialize_megatron",
        _with_folders,
        why="between the process groups, over which ranks agree on the checkpoint folders, and the "
        "model, which a load fills, pretrain calls nothing of ours",
        needed_while="\n    initialize_megatron(\n",
    ),
    Patch(
        name="weights-only",
        needed_by="torch/distributed/checkpoint/default_planner.py: DefaultLoadPlanner.load_bytes",
        why="torch.load would run code from a checkpoint: from here on it refuses what is not "
        "registered as safe",
        apply=load_weights_only,
        still_needed=lambda: (
            "weights_only=False" in inspect.getsource(DefaultLoadPlanner.load_bytes)
        ),
    ),
)


def _damage(folder: Path, sums: bool) -> str | None:
    """The first damage that any rank finds in its share of the files. Collective."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        entries = read_sums(folder) or {}
        largest_first = sorted(entries, key=lambda name: (-(entries[name].size or 0), name))
        found = find_damage(folder, {n: entries[n] for n in largest_first[rank::ranks]}, sums)
    except ValueError as error:
        found = str(error)
    everyone: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(everyone, found)
    return next((one for one in everyone if one is not None), None)


def _earlier_with_sums(folder: Path) -> list[int]:
    number = iteration_of(folder)
    return [
        i
        for i in iterations(folder.parent)
        if number is not None and i < number and (folder.parent / _name(i) / SUMS_NAME).is_file()
    ]


def _newest_whole(load: Path, below: Path | None = None) -> int | None:
    """The newest iteration whose files have the recorded sizes; one process, no file is read."""
    limit = iteration_of(below) if below is not None else None
    for number in iterations(load):
        if limit is not None and number >= limit:
            continue
        try:
            entries = read_sums(load / _name(number))
        except ValueError:
            continue
        if entries and find_damage(load / _name(number), entries, sums=False) is None:
            return number
    return None


def _offer(load: Path, whole: int | None, folder: Path) -> str:
    """How to go on without `folder`."""
    if whole is None:
        return (
            f"no earlier iteration in {load} is known to be whole; restore the file, or give "
            "another --load"
        )
    return (
        f"iteration {whole} in {load} is whole: pass --ckpt-step {whole} until the run has saved "
        f"again, in place of {folder.name}"
    )


def _name(iteration: int) -> str:
    return ITERATION_FORMAT.format(iteration)
