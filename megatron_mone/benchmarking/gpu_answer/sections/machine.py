"""Versions, and what the machine can do at most: a copy and a bf16 product."""

import torch

from megatron_mone.benchmarking.gpu_answer.clock import replay_ms
from megatron_mone.benchmarking.gpu_answer.notebook import Notebook
from megatron_mone.benchmarking.gpu_answer.plan import Plan
from megatron_mone.common import machine
from megatron_mone.kernels.measured import machine_class

COPY, BF16 = "copy bytes/s", "bf16 flops/s"


def run(plan: Plan, device: torch.device, book: Notebook) -> None:
    """Facts first, so that they are there whatever follows."""
    book.fact(**machine.facts())
    packages = ("triton", "transformer-engine", "numpy", "nvidia-cublas")
    found = [f"{name} {version}" for name in packages if (version := machine.version(name))]
    book.fact(Packages=", ".join(found))
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        book.fact(
            GPU=about.name, Class=machine_class("cuda"), CUDA=str(torch.version.cuda),
            Multiprocessors=str(about.multi_processor_count),
            Memory=f"{about.total_memory / 2**30:.0f} GiB",
        )  # fmt: skip
    source = torch.ones(plan.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = replay_ms(lambda: target.copy_(source), device, plan.repeats)
    book.peak(COPY, 2 * plan.copy_bytes / ms * 1e3)
    side = plan.peak_side
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    ms = replay_ms(lambda: a @ b.t(), device, plan.repeats)
    book.peak(BF16, 2 * side**3 / ms * 1e3)
