"""Ranks of test_profiled_engines: runs of both engines in one process, each measured in four ways.

Of every run a rank writes its losses, where its collectives ran, what DeepSpeed's comms logger and
FLOPS profiler saw of the same steps, and what our counts are.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mone.common.patch import Replaced
from megatron_mone.profiling import baselines

STEPS = 3  # whose losses are compared
WITH_BALANCE = "with balance loss"


def main(words: list[str], against: tuple[str, ...], folder: str) -> None:
    """One rank."""
    from megatron_mone import cpu_emulation

    cpu_emulation.install()
    from megatron.training import training

    from megatron_mone.profiling.job import build_runs
    from megatron_mone.profiling.job_options import Options

    named = {**baselines._NAMED, WITH_BALANCE: replace(
        baselines._NAMED["deepspeed-moe"], name=WITH_BALANCE
    )}  # fmt: skip
    options = Options(STEPS, 1, 1, against, "real", False, False, Path(folder))
    with Replaced(baselines, "_NAMED", named):
        runs = build_runs(options, words)
    losses: list[float] = []
    norms: list[float] = []
    train_step = training.train_step

    def noted(*given: Any, **named: Any) -> Any:
        result = train_step(*given, **named)
        losses.append(float(result[0]["lm loss"]))
        norms.append(float(result[5]))
        return result

    training.train_step = noted
    found = {}
    for run in runs:
        losses.clear()
        norms.clear()
        for _ in range(STEPS):
            step(run)
        found[run.run.name] = {
            "losses": list(losses),
            "norms": list(norms),
            "collectives": collectives(run),
            "operations": operations(run),
        }
    rank = torch.distributed.get_rank()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def step(run: Any, facts: Any = None) -> None:
    run.enter()
    run.step()
    if facts is not None:
        facts.end_step()
    run.leave()


def collectives(run: Any) -> dict[str, Any]:
    """Of one step: {"operation group, phase, pass": calls}, and calls and bytes put in by operation
    as we and as DeepSpeed's logger see them."""
    import deepspeed.comm.comm as logged

    from megatron_mone.profiling.clock import HostStamps, PhaseClock
    from megatron_mone.profiling.communication import sent_bytes
    from megatron_mone.profiling.instrument import Instruments

    clock = PhaseClock(HostStamps())
    instruments = Instruments(clock)
    instruments.attach(run.run.model, run.run.optimizer)
    logged.comms_logger.comms_dict.clear()
    logged.configure(enabled=True, prof_all=True)
    clock.begin()
    step(run)
    clock.end()
    logged.configure(enabled=False, prof_all=False)
    instruments.detach()
    noted = clock._step
    at = {moment: f"{phase}, {pass_}" for moment, phase, pass_ in noted.switches}
    where: Counter[str] = Counter()
    ours: dict[str, list[int]] = {}
    for call, calls, size, start, _ in noted.communication:
        if calls:
            operation, group, key = call.operation, call.group, f"{call.operation} {call.group}"
            put_in = size / (sent_bytes(operation, 1, _ranks(group)) or 1)
            where[f"{key}, {at[start]}"] += 1
            count = ours.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += round(put_in)
    theirs = {
        name: [sum(entry[0] for entry in sizes.values()), sum(n * e[0] for n, e in sizes.items())]
        for name, sizes in logged.comms_logger.comms_dict.items()
    }
    return {"where": where, "ours": ours, "theirs": theirs}


def _ranks(group: str) -> int:
    from megatron.core import parallel_state

    if group == "ep":
        return parallel_state.get_expert_model_parallel_world_size()
    if group == "edp":
        return parallel_state.get_expert_data_parallel_world_size()
    return torch.distributed.get_world_size()


def operations(run: Any) -> dict[str, Any]:
    """Of one step: our formula by phase, our counter, twice the products that DeepSpeed's profiler
    counts in its forward passes, and rows."""
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    from megatron_mone.profiling.flop_counter import FlopCounter
    from megatron_mone.profiling.instrument import moe_layers
    from megatron_mone.profiling.load_facts import LoadFacts
    from megatron_mone.profiling.peaks import RankPeaks
    from megatron_mone.profiling.record_facts import counted_flops

    facts = LoadFacts(moe_layers(run.run.model))
    profiler = FlopsProfiler(run.run.model[0])
    facts.attach()
    facts.begin_step()
    profiler.start_profile()
    with FlopCounter() as counter:
        step(run, facts)
    profiler.stop_profile()
    macs = profiler.get_total_macs()
    profiler.end_profile()
    facts.detach()
    return {
        "formula": counted_flops(run.run, facts, RankPeaks(None, None))["modules"],
        "counted": counter.total(),
        "by operation": counter.by_operation(),
        "deepspeed": 2 * macs,
        "rows": facts.rows(),
        "computed": list(facts.computed().values()),
    }
