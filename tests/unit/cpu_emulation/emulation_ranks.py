"""Starts emulated ranks once and runs many cases in them.

A case is a function of no arguments that asserts; it runs on every rank, after `install()` and
Megatron's own start of its process groups and random states.
"""

import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch

from tests import forked_ranks

Case = Callable[[], None]
Layout = tuple[dict[str, int], Sequence[Case]]


def _rank(folder: str, layouts: Sequence[Layout]) -> None:
    from megatron_mone.cpu_emulation import install

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    install()
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "nccl",  # what a GPU program asks for
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    for parallel, cases in layouts:
        parallel_state.initialize_model_parallel(**parallel)
        for case in cases:
            torch.manual_seed(7)
            tensor_parallel.model_parallel_cuda_manual_seed(123, force_reset_rng=True)
            try:
                case()
            except Exception:
                (Path(folder) / f"{case.__name__}.{rank}").write_text(traceback.format_exc())
        parallel_state.destroy_model_parallel()


def run_cases(size: int, layouts: Sequence[Layout], *, fresh: bool = False) -> dict[str, str]:
    """Run cases on `size` ranks; return the tracebacks of each case, "" where all passed.

    A layout is what `initialize_model_parallel` gets, e.g. `{"context_parallel_size": 2}`, and the
    cases to run under it. `fresh`: the cases' modules are imported before Megatron is.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        job = forked_ranks.start(size, _rank, (folder, list(layouts)), log, fresh=fresh)
        if job.wait(timeout=600) != 0:
            raise AssertionError(f"a rank ended early:\n{log.read_text(errors='replace')[-6000:]}")
        return {
            case.__name__: "\n".join(
                f"rank {file.suffix}: {file.read_text()}"
                for file in sorted(Path(folder).glob(f"{case.__name__}.*"))
            )
            for _, cases in layouts
            for case in cases
        }
