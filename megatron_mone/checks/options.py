"""Options of Megatron that need a package or a device which is not here. Touches nothing."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec

import torch


def check_async_save(args: Namespace) -> None:
    """Megatron starts its writer process only later, and hangs where that cannot run.

    Raises:
        ValueError: CPU ranks, or the package of the chosen strategy is absent.
    """
    if not args.async_save:
        return
    if not torch.cuda.is_available():
        raise ValueError(
            "async_save = True is not available on CPU ranks, where Megatron's writer process "
            "never answers: drop --async-save"
        )
    if args.async_strategy == "nvrx" and find_spec("nvidia_resiliency_ext") is None:
        raise ValueError(
            "async_strategy = 'nvrx' needs nvidia-resiliency-ext: pip install "
            "nvidia-resiliency-ext, or pass --async-strategy mcore"
        )
