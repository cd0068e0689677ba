"""Jobs of CPU ranks as Megatron reads them, in this process, and what they are made of."""

from megatron_mone.planning.tracing.gpu_job import parse_gpu_job
from tests.training_cases import MOCK, MONE, TINY

JOB = (*TINY, *MOCK, *MONE, "--mone-backend", "cpu")


def parsed(monkeypatch, flags, world_size):
    """(args, GPTModelConfig); environment and globals are left as they were."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training import global_vars

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    try:
        return parse_gpu_job(flags, world_size, rank=0)
    finally:
        global_vars.destroy_global_vars()
        destroy_num_microbatches_calculator()
