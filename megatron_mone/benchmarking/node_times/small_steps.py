"""A small job's steps, profiled: what its phases take, and what it waits for its collectives.

The profiler is started beside this process, a rank of it on each rank of the job: it measures
Megatron's own step, module by module. May touch: the processes, the folder of the profile.
"""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_mone.common.child_processes import tied
from megatron_mone.common.places import program_words
from megatron_mone.common.surroundings import without_ranks
from megatron_mone.planning.fitting.node_times import CallTime, SmallJob, StepTime
from megatron_mone.profiling.communication import phase_of
from megatron_mone.profiling.merge import rank_files
from megatron_mone.profiling.profile_document import MeanCalls
from megatron_mone.profiling.rank_record import read_record
from megatron_mone.profiling.rank_steps import PHASE_NAMES, align, common_steps, take_steps

STEPS = 12
DISTURBED = 1.1
_NO_END = ("--train-iters", "1000", "--eval-interval", "1000", "--eval-iters", "0")


def run_steps(job: SmallJob, folder: Path, rank: int, port: int, limit: float) -> None:
    """Profile the steps of a small job as one of its ranks; the first writes the profile.

    Args:
        job: of at least `rank + 1` ranks, all of which do this at once.
        folder: of the profile.
        rank: of this process in it.
        port: on MASTER_ADDR.
        limit: seconds that the process may take.

    Raises:
        RuntimeError: one line; it failed, or took longer.
    """
    words = [*program_words("profile"), "--steps", str(STEPS), "--windows", "2", "--warm-up", "2"]
    routing = ["--routing", "balanced"] if "--num-experts" in job.flags else []
    command = [sys.executable, *words, *routing, "--no-memory", "--out", str(folder), *job.flags]
    own = {"RANK": str(rank), "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
           "WORLD_SIZE": str(job.ranks), "MASTER_PORT": str(port),
           "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1")}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:05d}.log"
    with path.open("w") as log:
        try:
            done = subprocess.run(
                [*command, *_NO_END], env={**without_ranks(os.environ), **own}, stdout=log,
                stderr=log, timeout=max(1.0, limit), preexec_fn=tied(), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it took longer than its {limit:.0f} s") from None
    if done.returncode:
        lines = path.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"it failed: {lines[-1] if lines else done.returncode}")


def step_time(folder: Path) -> StepTime:
    """What the rank files in a folder say of the steps that nothing else on the machine disturbed:
    those up to DISTURBED times as long as the quietest half's mean. As in a profile the middle half
    of them is the mean.

    Raises:
        ValueError: one is damaged; one line.
    """
    records = [read_record(path) for path in rank_files(folder)]
    ranks = [take_steps(record, record.runs[0]) for record in records]
    steps = common_steps(ranks)
    slowest_S = align(ranks, steps).step_ms_RS.max(axis=0)
    quiet_ms = np.sort(slowest_S)[: max(1, len(steps) // 2)].mean()
    found = align(ranks, steps[slowest_S < DISTURBED * quiet_ms])
    phase_ms_P = found.mean(found.phase_ms_RPQS).sum(axis=1)
    collectives = [MeanCalls(**one) for one in found.collectives()]
    phases = {name: float(ms) for name, ms in zip(PHASE_NAMES, phase_ms_P, strict=True) if ms > 0}
    return StepTime(
        step_ms=float(found.mean(found.step_ms_RS)),
        phases_ms=without_collectives(phases, collectives), collectives=_alike(collectives),
    )  # fmt: skip


def without_collectives(
    phases_ms: Mapping[str, float], collectives: Sequence[MeanCalls]
) -> dict[str, float]:
    """What is left of each phase if its collectives are taken out."""
    found = dict(phases_ms)
    for one in collectives:
        phase = phase_of(one.phase, one.group)
        found[phase] = max(0.0, found.get(phase, 0.0) - one.ms)
    return found


def _alike(collectives: Sequence[MeanCalls]) -> list[CallTime]:
    """By kind, group and size, whatever the phase; those that were called."""
    found: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in collectives:
        sums = found[one.operation, one.group, one.bytes]
        sums[0] += one.calls
        sums[1] += one.ms
    return [
        CallTime(kind=kind, group=group, bytes=size, calls=calls, ms=ms)
        for (kind, group, size), (calls, ms) in sorted(found.items())
        if calls
    ]
