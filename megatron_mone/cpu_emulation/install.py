"""The table of all patches, and the one call that applies them."""

import torch

from megatron_mone.common import patch
from megatron_mone.common.patch import Patch
from megatron_mone.cpu_emulation import (
    activation_offload,
    compilers,
    cuda_calls,
    device,
    distributed,
    fsdp,
    hybrid,
    latent,
    memory,
    moe,
    norms,
    optimizer,
    rng,
    specs,
    training,
    weight_gradients,
)

# Compilers first: torch._dynamo keeps tables of torch's functions by identity, so it is loaded
# before they are replaced. Then torch: Megatron's modules take its functions by name on import.
PATCHES: tuple[Patch, ...] = (
    *compilers.PATCHES[:1],
    *device.PATCHES,
    *cuda_calls.PATCHES,
    *memory.PATCHES,
    *rng.PATCHES[:1],
    *distributed.PATCHES,
    *compilers.PATCHES[1:],
    *training.PATCHES,
    *weight_gradients.PATCHES,
    *activation_offload.PATCHES,
    *rng.PATCHES[1:],
    *norms.PATCHES,
    *moe.PATCHES,
    *latent.PATCHES,
    *optimizer.PATCHES,
    *specs.PATCHES,
    *fsdp.PATCHES,
    *hybrid.PATCHES,  # after the attention that its layers take
)

_installed = False


def is_installed() -> bool:
    """Whether this process runs under the emulation."""
    return _installed


def install() -> None:
    """Redirect Megatron's CUDA calls to the CPU in this process. A second call does nothing.

    Call it before Megatron is used; it may have been imported. Raises RuntimeError on a machine
    where CUDA is available: run without it there.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "the CPU emulation refuses to install: torch.cuda.is_available() is True; "
            "run without it, or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        )
    patch.install(PATCHES)
    _installed = True
