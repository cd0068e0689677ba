"""The profiler on a normal training run: a window of its steps, then off for good.

    --mone-profile-steps 100:120 --mone-profile-dir out/profile

Before and after the window the run is Megatron's alone: nothing is wrapped. Every rank writes its
own file; tools/merge_profile.py and tools/report_profile.py make the rest of them. May touch:
`training.train_step`, put back after the window.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from megatron_mone.common.patch import Replaced
from megatron_mone.model.profile_window import profile_dir
from megatron_mone.profiling.rank_record import write_record

NAME = "train"
WRITE_EVERY_SECONDS = 10.0
"""Within the window, so that a rank that dies leaves what it had."""


class AttachedProfiler:
    """Profiles steps `first` to `last` of the run that Megatron's loop makes in this process.

    Args:
        args: Megatron's arguments, validated.
        words: of the command line, those of a run file written out.
        first, last: steps, 1-based, both included.
    """

    def __init__(self, args: Namespace, words: Sequence[str], first: int, last: int) -> None:
        from megatron.training import training

        folder = profile_dir(args)
        assert folder is not None
        self.args, self.words, self.folder = args, words, folder
        self.first, self.last = first, last
        self._train_step: Any = training.train_step
        self._attached = ExitStack()
        self._attached.enter_context(Replaced(training, "train_step", self._step))
        self._meter: Any = None
        self._facts: dict[str, Any] = {}
        self._written = time.monotonic()

    def close(self) -> None:
        """Take everything off; called after the window, and at the run's end whatever ended it."""
        self._attached.close()
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
        job = begin_job(self.folder)
        self._facts = rank_facts(self.args, self.words, job, _routing(self.args))
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
        runs = [
            {
                **record,
                "flops": counted_flops(meter.run, meter.facts, peaks, meter.documents.mean()),
            }
        ]
        write_record(self.folder, {**self._facts, "complete": complete, "runs": runs})
        self._written = time.monotonic()


def attach(
    args: Namespace, words: Sequence[str], window: tuple[int, int] | None
) -> Callable[[], None]:
    """Profile `window` of the run that is about to start; returns what ends it."""
    if window is None:
        return lambda: None
    return AttachedProfiler(args, words, *window).close


def _routing(args: Namespace) -> str:
    return "balanced" if args.moe_router_force_load_balancing else "real"
