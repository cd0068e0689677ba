"""What the profiler itself costs: steps with it on against steps without, in turn, in one job.

    python tools/bench_profiler.py --config configs/demo-mone.yaml --ranks 2 --steps 60 [--json OUT]

On: the ratio of paired windows, with a 95% confidence interval; and, free of the machine's noise,
the switches of phase in a step times the time of one. Off: nothing is wrapped; what is left are the
calls by which kernels name their phase, counted alike. Further flags are Megatron's.
"""

import os
import sys
import tempfile
import time
import timeit
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mone.common.files import write_json
from megatron_mone.common.local_ranks import run_ranks, terminal
from megatron_mone.common.machine import facts
from megatron_mone.common.places import program_words
from megatron_mone.profiling.job_options import Options
from megatron_mone.profiling.resample import Samples, difference

WARM_UP = 5
SCHEMA = "megatron-mone/profiler-cost/1"


def run(options: Any, megatron_flags: list[str], words: list[str]) -> int:
    """Start the ranks here, or be one of them; the status.

    Args:
        options: of the command (commands/bench.py).
        megatron_flags: further ones.
        words: all of the command, for its ranks.
    """
    if "WORLD_SIZE" not in os.environ:
        with tempfile.TemporaryDirectory() as logs:
            return run_ranks(
                [sys.executable, *program_words("bench_profiler"), *words],
                options.ranks,
                Path(logs),
            )
    measure(options, megatron_flags)
    return 0


def measure(options: Any, megatron_flags: list[str]) -> None:
    """One rank's part; rank 0 prints."""
    import torch

    if not torch.cuda.is_available():
        from megatron_mone import cpu_emulation

        cpu_emulation.install()
    from megatron_mone.model.arguments import written_out
    from megatron_mone.model.failure import fail
    from megatron_mone.profiling.clock import phase_clock
    from megatron_mone.profiling.job import build_runs
    from megatron_mone.profiling.run_meter import RunMeter

    turns = max(2, options.steps // options.window)
    steps = WARM_UP + 2 * turns * (options.window + 1)
    try:
        words = written_out(megatron_flags)
        (run,) = build_runs(Options(steps, 1, 1, (), "real", False, False, Path()), words)
    except ValueError as error:
        fail(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = RunMeter(run.run, phase_clock())

    def step(call: Any) -> float:
        run.enter()
        torch.distributed.barrier()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        run.leave()
        return seconds

    for _ in range(WARM_UP):
        step(run.step)
    seconds: dict[bool, list[list[float]]] = {False: [], True: []}
    for turn in range(turns):
        for on in (False, True) if turn % 2 else (True, False):
            if on:
                meter.attach()
            step(run.step)  # settles
            call = partial(_measured, meter, run, turn) if on else run.step
            seconds[on].append([step(call) for _ in range(options.window)])
            if on:
                meter.detach()
    marks = marks_in_a_step(step, run)
    meter.attach()
    step(partial(_measured, meter, run, turns))
    meter.detach()
    if torch.distributed.get_rank() == 0:
        report(seconds, marks, switches_in_a_step(meter.clock), options, words)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _measured(meter: Any, run: Any, window: int) -> None:
    meter.measure(run.iteration, window, run.step)


def marks_in_a_step(step: Any, run: Any) -> int:
    """Calls of phases.enter in one step."""
    from megatron_mone.common import phases

    heard: list[str] = []
    phases.listen(heard.append)
    step(run.step)
    phases.listen(None)
    return len(heard)


def switches_in_a_step(clock: Any) -> tuple[int, float]:
    """(switches of phase in the last step, nanoseconds of one)."""
    from megatron_mone.common import phases

    switches = len(clock.host_spans())
    clock.begin()
    calls = 20_000
    seconds = timeit.timeit(lambda: clock.switch(phases.ROUTER, phases.FORWARD), number=calls)
    clock.abandon()
    return switches, seconds / calls * 1e9


def report(
    seconds: dict[bool, list[list[float]]],
    marks: int,
    switches: tuple[int, float],
    options: Any,
    words: list[str],
) -> None:
    """Print the cost, and write it where asked to."""
    from megatron_mone.common import phases

    off, on = (_samples(seconds[kind]) for kind in (False, True))
    cost = difference(off, on, same_job=True)
    step_ms = float(cost.a_K[0])
    assert cost.lower_K is not None
    assert cost.upper_K is not None
    low, high = (100 * float(bound[0]) / step_ms for bound in (cost.lower_K, cost.upper_K))
    calls = 200_000
    mark_ns = timeit.timeit(lambda: phases.enter(phases.ROUTER), number=calls) / calls * 1e9
    found = {
        "schema": SCHEMA,
        "machine": facts(),
        "ranks": int(os.environ["WORLD_SIZE"]),
        "argv": words,
        "steps_each": on.windows.size,
        "step_ms_off": step_ms,
        "step_ms_on": float(cost.b_K[0]),
        "on_percent": 100 * float(cost.b_K[0] / cost.a_K[0] - 1),
        "on_percent_95": [low, high],
        "switches_a_step": switches[0],
        "switch_ns": switches[1],
        "on_counted_percent": 100 * switches[0] * switches[1] / 1e6 / step_ms,
        "marks_a_step": marks,
        "mark_ns": mark_ns,
        "off_percent": 100 * marks * mark_ns / 1e6 / step_ms,
    }
    print(
        f"off   {step_ms:9.2f} ms a step; {marks} marks of {mark_ns:.0f} ns in it: "
        f"{found['off_percent']:.4f}%\n"
        f"on    {found['step_ms_on']:9.2f} ms: {found['on_percent']:+.2f}% "
        f"(95%: {low:+.2f} to {high:+.2f}); {switches[0]} switches of {switches[1]:.0f} ns: "
        f"{found['on_counted_percent']:.4f}%",
        file=terminal(),
        flush=True,
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, found)


def _samples(seconds: list[list[float]]) -> Samples:
    ms = 1e3 * np.array(seconds)
    windows = np.repeat(np.arange(len(seconds)), ms.shape[1])
    return Samples(windows, ms.reshape(-1), ms.reshape(1, -1))
