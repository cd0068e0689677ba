"""Flags of a GPU job, read and checked on a machine without a GPU as GPUs would have it.

Megatron's own parser and checks decide; where they ask the machine, they are told of an NVIDIA GPU
(compute capability 9.0) with Transformer Engine (stand_ins/package.py), Apex's kernels and DeepEP.
What only the cluster has is not looked for: data, folders, checkpoints. A job of CPU ranks
(`transformer_impl local`) is read as its ranks read it. May touch: this process, whole: it is for
jobs of one kind from the first on.
"""

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megatron_mone.common.patch import Replaced
from megatron_mone.deepspeed.settings import is_deepspeed, settings_of

CAPABILITY = (9, 0)
"""Reported compute capability: Hopper's, the least with fp8."""


_NOT_MODELLED = (
    "fp8_dot_product_attention",
    "fp8_multi_head_attention",
    "cpu_offloading",
    "use_torch_fsdp2",
)
_CANNOT = "{name} = True cannot be planned: its work is not modelled; unset it"


def is_gpu_job(flags: Sequence[str]) -> bool:
    """Whether the layers are Transformer Engine's: `--transformer-impl`, a run file's, or none.

    Args:
        flags: as `megatron_mone.pretrain` takes them.

    Raises:
        ValueError: the run file cannot be read.
    """
    found = last_value(flags, "--transformer-impl")
    if found is None:
        run = last_value(flags, "--config")
        if run is not None:
            from megatron_mone.model.run_config import load_run

            found = load_run(Path(run)).get("transformer_impl")
    return found in (None, "transformer_engine")


def last_value(flags: Sequence[str], name: str) -> str | None:
    """The value of a flag: of the last, as argparse has it; None where it is not given.

    Args:
        flags: words of a command line.
        name: of the flag.
    """
    found = None
    for place, flag in enumerate(flags):
        if flag == name and place + 1 < len(flags):
            found = flags[place + 1]
        elif flag.startswith(f"{name}="):
            found = flag.partition("=")[2]
    return found


def prepare(gpu: bool) -> None:
    """Make this process one for jobs of one kind; before Megatron is imported.

    Args:
        gpu: whether they are GPU jobs.

    Raises:
        RuntimeError: Megatron was imported already, for jobs of CPU ranks.
    """
    if gpu:
        from megatron_mone.planning.tracing.stand_ins import package as fused_package

        fused_package.install()
    from megatron_mone import cpu_emulation

    cpu_emulation.install()


def parse_gpu_job(flags: Sequence[str], world_size: int, rank: int) -> tuple[Namespace, Any]:
    """Validate a job in this process.

    Args:
        flags: as `megatron_mone.pretrain` takes them, of a GPU job or of CPU ranks.
        world_size: W, ranks of the job.
        rank: 0 to W - 1.

    Returns:
        Megatron's arguments, and the GPTModelConfig of them.

    Raises:
        ValueError: one line: Megatron or a check of ours refuses the flags.
    """
    for name in _NOT_MODELLED:
        if f"--{name.replace('_', '-')}" in flags:  # Megatron may refuse it for what it lacks here
            raise ValueError(_CANNOT.format(name=name))
    gpu = is_gpu_job(flags)
    prepare(gpu)
    from megatron_mone.model.arguments import parse_arguments
    from megatron_mone.model.config_builder import build_model_config

    os.environ.update(
        WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1", NVTE_CPU_OFFLOAD_V1="1",  # which Megatron asks for beside offloading
    )  # fmt: skip
    with _as_on_the_cluster() if gpu else nullcontext():
        try:
            args = parse_arguments(flags, elsewhere=gpu)
            config = build_model_config(args, elsewhere=gpu)
            check_traceable(args)
            return args, config
        except (ValueError, AssertionError) as error:
            raise ValueError(" ".join(str(error).split())) from error


def check_traceable(args: Namespace) -> None:
    """What the tracer does not model must be off.

    Args:
        args: Megatron's, validated.

    Raises:
        ValueError: names the argument, its value and what to do.
    """
    for name in _NOT_MODELLED:
        if getattr(args, name, False):
            raise ValueError(_CANNOT.format(name=name))
    if getattr(args, "dataloader_inter_document_masking", False) and args.window_size:
        raise ValueError(
            f"window_size = {args.window_size!r} cannot be planned with packed documents: which "
            "pairs a window leaves of them is not modelled; leave one of them out"
        )
    if pattern := getattr(args, "hybrid_layer_pattern", None):
        refused = {
            "hybrid_layer_pattern": "/" in pattern or set(pattern) & set("GD"),
            "cuda_graph_impl": getattr(args, "cuda_graph_impl", "none") != "none",
            "dataloader_inter_document_masking": getattr(
                args, "dataloader_inter_document_masking", False
            ),
        }
        for name in (name for name, wrong in refused.items() if wrong):
            raise ValueError(
                f"{name} = {getattr(args, name)!r} cannot be planned of a hybrid model: "
                "multi-token prediction, layers G and D, CUDA graphs and packed documents are not "
                "modelled there; leave it out"
            )
    zero = settings_of(args)["zero_optimization"] if is_deepspeed(args) else {}
    for name in ("offload_optimizer", "offload_param"):
        device = zero.get(name, {}).get("device", "none")
        if device != "none":
            raise ValueError(f"zero_optimization.{name}.device = {device!r} cannot be planned: its "
                             "work is not modelled; leave it out")  # fmt: skip


@contextmanager
def _as_on_the_cluster() -> Iterator[None]:
    """While it lasts the machine answers as one with GPUs."""
    import torch
    from megatron.core.transformer.moe import fused_a2a

    with (
        Replaced(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        Replaced(fused_a2a, "HAVE_DEEP_EP", True),
        Replaced(fused_a2a, "HAVE_HYBRIDEP", True),
        Replaced(fused_a2a, "HAVE_TE_EP", True),
    ):
        yield
