"""The trace of one rank, by the processes that trace for the planner."""

from collections.abc import Sequence

from megatron_mone.planning.tracing.gpu_job import is_gpu_job
from megatron_mone.planning.tracing.trace import Trace
from megatron_mone.planning.tracing.trace_worker import CPU, GPU, TRACE
from megatron_mone.planning.tracing.worker_pool import Request, WorkerPool


def trace_rank(
    pools: dict[str, WorkerPool],
    flags: Sequence[str],
    world_size: int,
    rank: int,
    rows: Sequence[int] | None = None,
) -> Trace:
    """See build.trace_step; its ValueError, or a RuntimeError, is one line."""
    job = {"flags": list(flags), "world_size": world_size, "rank": rank, "rows": rows}
    made: list[Trace] = []
    pool = pools[GPU if is_gpu_job(flags) else CPU]
    pool.answer([Request(TRACE, job, "the trace")], lambda _, p: made.append(Trace.read(p)))
    return made[0]
