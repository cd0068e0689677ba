"""The steps of a training run that are profiled, and where to: the flags and their checks.

Touches nothing; `profiling/attach.py` does what they ask.
"""

import argparse
from argparse import Namespace
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to Megatron's parser."""
    group = parser.add_argument_group("MoNE profiler")
    group.add_argument(
        "--mone-profile-steps",
        metavar="FIRST:LAST",
        help="profile these training steps, both included, counted from 1",
    )
    group.add_argument(
        "--mone-profile-dir",
        metavar="DIR",
        help="folder for the profile; default: profile/ in --tensorboard-dir, else in --save",
    )


def window_of(args: Namespace) -> tuple[int, int] | None:
    """(first, last) step to profile, 1-based; None where none is.

    Raises:
        ValueError: the text is not FIRST:LAST, or no folder is known to write to.
    """
    text = args.mone_profile_steps
    if text is None:
        if args.mone_profile_dir is not None:
            raise ValueError(
                f"mone_profile_dir = {args.mone_profile_dir!r} without --mone-profile-steps "
                "FIRST:LAST profiles nothing: give both or neither"
            )
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"mone_profile_steps = {text!r} is not a window of steps: write FIRST:LAST, as 100:120"
        )
    if args.train_iters and int(first) > args.train_iters:
        raise ValueError(
            f"mone_profile_steps = {text!r} begins after the last step, train_iters = "
            f"{args.train_iters}"
        )
    if profile_dir(args) is None:
        raise ValueError(
            "mone_profile_steps needs a folder to write to: give --mone-profile-dir, "
            "--tensorboard-dir or --save"
        )
    return int(first), int(last)


def profile_dir(args: Namespace) -> Path | None:
    """Where the profile goes."""
    if args.mone_profile_dir is not None:
        return Path(args.mone_profile_dir)
    parent = args.tensorboard_dir or args.save
    return Path(parent) / "profile" if parent else None
