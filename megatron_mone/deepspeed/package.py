"""The package `deepspeed`, told of this machine before its first import.

May touch: DS_ACCELERATOR and LOCAL_RANK of the environment.
"""

import importlib
import os
from typing import Any

import torch

from megatron_mone.common.patch import Replaced


def package() -> Any:
    """It, for GPUs where torch has one, else for CPU ranks."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    return deepspeed


def init_distributed() -> None:
    """Have it take over the process groups that there are.

    On CPU ranks it would compile an all-reduce over shared memory first; gloo's will do.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # of a process that no launcher started
    deepspeed = package()
    backend = importlib.import_module("deepspeed.comm.torch")  # which names torch itself so too
    kind = "nccl" if torch.cuda.is_available() else "gloo"
    with Replaced(backend, "build_shm_op", lambda: None):
        deepspeed.init_distributed(dist_backend=kind, verbose=False)
