"""Questions to the installed torch that need two ranks."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _try_unequal(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outputs = [torch.zeros(1), torch.zeros(2)]
    try:
        dist.all_gather(outputs, torch.ones(rank + 1))
    except (RuntimeError, ValueError):
        return
    (Path(folder) / f"works{rank}").touch()


def unequal_gather_fails() -> bool:
    """Whether gloo's all_gather refuses (or hangs up on) tensors of unequal size, on two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_try_unequal, args=(folder,), nprocs=2)
        return not all((Path(folder) / f"works{rank}").exists() for rank in range(2))
