"""The sections of the answer: each a function of (Plan, device, Notebook)."""

from collections.abc import Callable

import torch

from megatron_mone.benchmarking.gpu_answer.notebook import Notebook
from megatron_mone.benchmarking.gpu_answer.plan import SHARES, Plan
from megatron_mone.benchmarking.gpu_answer.sections import (
    agreement,
    decode,
    gaps,
    kernels,
    layers,
    machine,
    waits,
)

SECTIONS: dict[str, Callable[[Plan, torch.device, Notebook], None]] = {
    "machine": machine.run,
    "agreement": agreement.run,
    "kernels": kernels.run,
    "layers": layers.run,
    "waits": waits.run,
    "decode": decode.run,
    "gaps": gaps.run,
}
assert SECTIONS.keys() == SHARES.keys()
