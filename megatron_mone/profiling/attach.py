"""The profiler on a normal training run: a window of its steps, then off for good.

    --mone-profile-steps 100:120 --mone-profile-dir out/profile

Before and after the window the run is Megatron's alone: nothing is wrapped. Every rank writes its
own file; tools/merge_profile.py and tools/report_profile.py make the rest of them. May touch:
`training.train_step`, put back after the window.
"""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mone.profiling.rank_record import write_record

NAME = "train"
WRITE_EVERY_SECONDS = 10.0
"""Within the window, so that a rank that dies leaves what it had."""


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


class AttachedProfiler:
    """Profiles steps `first` to `last` of the run that Megatron's loop makes in this process.

    Args:
        args: Megatron's arguments, validated.
        first, last: steps, 1-based, both included.
    """

    def __init__(self, args: Namespace, first: int, last: int) -> None:
        from megatron.training import training

        folder = profile_dir(args)
        assert folder is not None
        self.args, self.first, self.last, self.folder = args, first, last, folder
        self._training = training
        self._train_step = training.train_step
        self._meter: Any = None
        self._facts: dict[str, Any] = {}
        self._written = time.monotonic()
        training.train_step = self._step

    def close(self) -> None:
        """Take everything off; called after the window, and at the run's end whatever ended it."""
        self._training.train_step = self._train_step
        if self._meter is not None:
            meter, self._meter = self._meter, None
            meter.detach()
            self._write(meter)

    def _step(self, *args: Any, iteration: int, **kwargs: Any) -> Any:
        number = iteration + 1

        def step() -> Any:
            return self._train_step(*args, iteration=iteration, **kwargs)

        if number < self.first:
            return step()
        if number > self.last:  # resumed beyond the window
            self.close()
            return step()
        if self._meter is None:
            self._begin(model=args[2], optimizer=args[3])
        result = self._meter.measure(iteration, 0, step)
        if number == self.last:
            self.close()
        elif time.monotonic() - self._written > WRITE_EVERY_SECONDS:
            self._write(self._meter)
        return result

    def _begin(self, model: Any, optimizer: Any) -> None:
        from megatron_mone.profiling.clock import phase_clock
        from megatron_mone.profiling.live_run import experts_backend
        from megatron_mone.profiling.record_facts import begin_job, rank_facts
        from megatron_mone.profiling.run_meter import Run, RunMeter

        run = Run(NAME, self.args, model, optimizer, experts_backend(model))
        self._facts = rank_facts(self.args, begin_job(self.folder), _routing(self.args))
        self._meter = RunMeter(run, phase_clock())
        self._meter.attach()

    def _write(self, meter: Any) -> None:
        from megatron_mone.profiling.peaks import RankPeaks, published_peaks
        from megatron_mone.profiling.record_facts import counted_flops

        peaks = RankPeaks(None, None)  # a CPU's would have to be measured, in the midst of training
        if torch.cuda.is_available():
            peaks = published_peaks(torch.cuda.get_device_name(), self.args.params_dtype)
        record = meter.record()
        if not record["steps"]:
            return
        # A run that resumed inside the window has fewer steps, and a checkpoint signal ends one.
        complete = record["steps"][-1] + 1 == self.last
        runs = [{**record, "flops": counted_flops(meter.run, meter.facts, peaks)}]
        write_record(self.folder, {**self._facts, "complete": complete, "runs": runs})
        self._written = time.monotonic()


def attach(args: Namespace, window: tuple[int, int] | None) -> Callable[[], None]:
    """Profile `window` of the run that is about to start; returns what ends it."""
    if window is None:
        return lambda: None
    return AttachedProfiler(args, *window).close


def _routing(args: Namespace) -> str:
    return "balanced" if args.moe_router_force_load_balancing else "real"
