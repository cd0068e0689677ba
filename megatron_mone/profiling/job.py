"""tools/profile.py on a rank: build the runs, measure them in turn, write what this rank saw.

    warm-up of every run | window 0: run A, run B, ... | window 1: run B, ..., run A | ... | memory

Every run takes the same steps on the same tokens; the order of the runs turns from window to
window, so that a machine that grows slower or faster is fair to all. The first step of a window is
not measured: it finds the caches full of another model. May touch: Megatron's start-up functions.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_mone.common.patch import install
from megatron_mone.profiling.baselines import parse_run, run_specs
from megatron_mone.profiling.clock import phase_clock
from megatron_mone.profiling.instrument import check_visible, moe_layers
from megatron_mone.profiling.job_options import SETTLING_STEPS, Options
from megatron_mone.profiling.ledger import persistent_tensors
from megatron_mone.profiling.live_run import LiveRun, build_run, model_config_of
from megatron_mone.profiling.peaks import rank_peaks
from megatron_mone.profiling.process_memory import share_one_heap
from megatron_mone.profiling.rank_record import write_record
from megatron_mone.profiling.record_facts import begin_job, counted_flops, rank_facts
from megatron_mone.profiling.routing_replay import SharedRouting, repeated_routing
from megatron_mone.profiling.run_meter import RunMeter
from megatron_mone.profiling.watched_steps import measure_memory, write_trace

OnStep = Callable[[int], None]


def build_runs(options: Options, words: Sequence[str]) -> list[LiveRun]:
    """All runs of a profile; starts the process groups.

    Args:
        options: of the command.
        words: Megatron's flags and ours, those of a run file written out.

    Raises:
        ValueError: a wrong flag, a baseline that does not fit; before any rank waits for another.
    """
    from megatron.training.initialize import initialize_megatron

    from megatron_mone.deepspeed.attach import PATCHES
    from megatron_mone.model.arguments import parse_arguments

    install(PATCHES)
    specs = run_specs(options.against)
    base = parse_arguments(words)
    if len(specs) > 1 and base.fine_grained_activation_offloading:
        raise ValueError(
            f"--against {options.against}: with fine_grained_activation_offloading a process has "
            "one model, whose groups Megatron knows: leave one of them out"
        )
    if base.train_iters and base.train_iters < options.steps_of_a_run:
        raise ValueError(
            f"train_iters = {base.train_iters} is fewer than the {options.steps_of_a_run} steps "
            "that each run takes: lower --steps or --windows, or raise --train-iters"
        )
    all_args = [base, *(parse_run(spec, base, words) for spec in specs[1:])]
    for args in all_args:
        args.moe_router_force_load_balancing |= options.routing == "balanced"
    configs = [model_config_of(spec, args) for spec, args in zip(specs, all_args, strict=True)]
    for config in configs:
        check_visible(config.transformer)
    share_one_heap()  # before process groups have threads
    initialize_megatron()
    return [
        build_run(spec, args, config)
        for spec, args, config in zip(specs, all_args, configs, strict=True)
    ]


class Job:
    """The runs of one profile on this rank.

    Args:
        runs: in the order of the report, the model under test first.
        options: of the command.
        words: that the runs were built from.
        on_step: told the number of steps done, of `options.total_steps`.
    """

    def __init__(
        self, runs: Sequence[LiveRun], options: Options, words: Sequence[str], on_step: OnStep
    ) -> None:
        self.runs = runs
        self.options = options
        self._on_step = on_step
        self._done = 0
        clock = phase_clock()
        self.meters = [RunMeter(run.run, clock) for run in runs]
        layers = [moe_layers(run.run.model) for run in runs]
        self.routing = SharedRouting(layers) if options.routing == "replayed" else None
        job = begin_job(options.out)
        self.facts = rank_facts(runs[0].run.args, words, job, options.routing)
        self.peaks = rank_peaks(runs[0].run.args.params_dtype, torch.distributed.barrier)

    def measure(self) -> Path:
        """Warm up, take every window, then the watched steps; returns this rank's record.

        The record is written after each window too, marked incomplete, so that a rank that dies
        leaves what it had.
        """
        for number, run in enumerate(self.runs):
            self._repeat(number, self.options.warm_up, run.step)
        for window, steps in enumerate(self.options.window_steps):
            for number in self._order(window):
                self._take_window(number, window, steps)
            self._write(complete=False)
        for number in range(len(self.runs)):
            self._watch(number)
        return self._write(complete=True)

    def _order(self, window: int) -> list[int]:
        """The runs in turn; one whose routing is replayed comes first, for it has to be there."""
        fixed = [] if self.routing is None else [0]
        turning = list(range(len(fixed), len(self.runs)))
        turn = window % max(1, len(turning))
        return fixed + turning[turn:] + turning[:turn]

    def _take_window(self, number: int, window: int, steps: int) -> None:
        run, meter = self.runs[number], self.meters[number]
        gc.collect()
        torch.distributed.barrier()
        meter.attach()
        try:
            self._repeat(number, SETTLING_STEPS, run.step)
            self._repeat(number, steps, lambda: meter.measure(run.iteration, window, run.step))
        finally:
            meter.detach()

    def _repeat(self, number: int, times: int, step: Callable[[], None]) -> None:
        for _ in range(times):
            with self._turn(number):
                step()

    @contextmanager
    def _turn(self, number: int) -> Iterator[None]:
        """One step of one run: its globals before it, its end of step after it."""
        run = self.runs[number]
        run.enter()
        if self.routing is not None:
            self.routing.begin_step(number, run.iteration)
        yield
        if self.routing is not None:
            self.routing.end_step(number, run.iteration)
        run.leave()
        self._done += 1
        self._on_step(self._done)

    def _watch(self, number: int) -> None:
        """Steps that are not timed: memory, and a trace."""
        run, meter = self.runs[number], self.meters[number]

        def step() -> None:
            with self._turn(number):
                run.step()

        if self.options.memory:
            with repeated_routing(moe_layers(run.run.model)) as repeat:
                meter.memory = measure_memory(
                    self.options.out,
                    run.run,
                    step,
                    before_second=repeat,
                    others=lambda: self._held_by_others(number),
                )
        if self.options.trace:
            write_trace(self.options.out, run.run, step)

    def _held_by_others(self, number: int) -> Iterable[Tensor]:
        for other, live in enumerate(self.runs):
            if other != number:
                held = persistent_tensors(live.run.model, live.run.optimizer)
                yield from (tensor for tensors in held.values() for tensor in tensors)

    def _write(self, *, complete: bool) -> Path:
        runs = [
            {
                **meter.record(),
                "flops": counted_flops(meter.run, meter.facts, self.peaks, meter.documents.mean()),
            }
            for meter in self.meters
        ]
        return write_record(self.options.out, {**self.facts, "complete": complete, "runs": runs})
