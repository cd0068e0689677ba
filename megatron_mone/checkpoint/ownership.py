"""A training run takes its --save folder before it builds a model, and keeps it to its end.

Rank 0 holds the lease (lease.py); the other ranks hear of it in the collective calls of a save and
of a step's end. Resuming from a folder (--load) needs no lease. May touch: the `.lease-*` and model
files of the --save folder.
"""

import contextlib
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from megatron_mone.checkpoint.lease.keeper import Keeper
from megatron_mone.checkpoint.lease.lease import (
    DEFAULT_SECONDS,
    LONGEST_SECONDS,
    SHORTEST_SECONDS,
    Holder,
    LeaseLostError,
    this_process,
)
from megatron_mone.checkpoint.lease.taking import Contender
from megatron_mone.checkpoint.model_file import write_model_file

_PATIENCE = 5.0
"""Seconds of waiting after which the other ranks hear that it goes on, lest they time out."""

_keeper: Keeper | None = None
"""On rank 0 of a run that saves."""
run = Namespace(save=None)
"""The arguments of the run under way, of `begin`."""


def add_arguments(parser: ArgumentParser) -> None:
    """The flag for the term of the lease."""
    parser.add_argument_group(title="checkpoint folder").add_argument(
        "--checkpoint-lease-seconds",
        type=_seconds,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help="A run holds its --save folder alone; after so long without a sign of life another "
        f"run may take it. {SHORTEST_SECONDS:g} to {LONGEST_SECONDS:g}; 0 for no lease, where the "
        "file system has no hard links and nothing else writes the folder.",
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if seconds == 0 or SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS:  # neither holds for nan
            return seconds
    raise ArgumentTypeError(
        f"checkpoint_lease_seconds = {text} is not {SHORTEST_SECONDS:g} to {LONGEST_SECONDS:g} "
        "seconds: give such a number, or 0 for no lease"
    )


def begin(args: Namespace) -> None:
    """Keep a run's arguments as they were validated: Megatron changes its own from here on."""
    global run
    run = Namespace(**vars(args))


def take_together(args: Namespace) -> None:
    """Take the --save folder and write there which model it holds. Collective over all ranks.

    Raises:
        ValueError: on every rank: another run holds it, or it cannot be leased; one line.
    """
    if not args.save:
        return
    if is_leased(args):
        _take(Path(args.save), args.checkpoint_lease_seconds)
    if torch.distributed.get_rank() == 0:
        write_model_file(Path(args.save), args)


def is_leased(args: Namespace) -> bool:
    """Whether the run saves to a folder of a file system, and has not turned the lease off."""
    local = bool(args.save) and not str(args.save).startswith("msc:")
    return local and args.checkpoint_lease_seconds > 0


def _take(folder: Path, seconds: float) -> None:
    tries = _tries(folder, this_process(seconds)) if torch.distributed.get_rank() == 0 else None
    outcome: list[Any] = [False, None]
    while not any(outcome):
        outcome = next(tries) if tries is not None else outcome
        torch.distributed.broadcast_object_list(outcome, src=0)
    if tries is not None:
        tries.close()
    _, refusal = outcome
    if refusal is not None:
        raise ValueError(refusal)


def _tries(folder: Path, me: Holder) -> Generator[list[Any]]:
    """[taken, why not]: what came of _PATIENCE seconds each; both are false while it waits."""
    global _keeper
    try:
        with Contender(folder, me) as contender:
            while (number := contender.take(_PATIENCE)) is None:
                yield [False, None]
            _keeper = Keeper(folder, number, me, contender.touched)
    except ValueError as error:
        yield [False, str(error)]
    except OSError as error:
        yield [
            False,
            f"save = {str(folder)!r} cannot be leased ({error.strerror}): give a folder with room "
            "where files can be hard linked, or pass --checkpoint-lease-seconds 0",
        ]
    else:
        yield [True, None]


def lost() -> str | None:
    """Why this rank knows that the folder is lost; reads no file. None on all ranks but 0."""
    return None if _keeper is None else _keeper.lost


def look() -> str | None:
    """As `lost`, having renewed the lease and looked for a newer one. Raises OSError."""
    return None if _keeper is None else _keeper.look()


def check() -> None:
    """Look, alone.

    Raises:
        LeaseLostError: this rank holds the folder no more.
        OSError: it cannot be known.
    """
    text = look()
    if text is not None:
        raise LeaseLostError(text)


def begin_save(args: Namespace) -> None:
    """Keep the folder until `end_save`. Collective over all ranks.

    Raises:
        LeaseLostError: on every rank: another run has it.
        OSError: on every rank: rank 0 could not look.
    """
    if not is_leased(args):
        return
    outcome: list[Any] = [None, None]
    if _keeper is not None:
        try:
            _keeper.begin_save()
        except LeaseLostError as error:
            outcome[0] = str(error)
        except OSError as error:
            outcome[1] = (error.errno, error.strerror)
    torch.distributed.broadcast_object_list(outcome, src=0)
    lost, failure = outcome
    if lost is not None:
        raise LeaseLostError(lost)
    if failure is not None:
        raise OSError(*failure)


def extend_save() -> None:
    """The save under way goes on in the background until one more `end_save`."""
    if _keeper is not None:
        _keeper.extend_save()


def end_save() -> None:
    """The save has ended, one way or the other."""
    if _keeper is not None:
        _keeper.end_save()


def release() -> None:
    """Give the folder back at the run's end; after a failure to, the lease expires."""
    global _keeper, run
    run = Namespace(save=None)
    if _keeper is not None:
        with contextlib.suppress(OSError):
            _keeper.release()
        _keeper = None
