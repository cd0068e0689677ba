"""Run Megatron-Core's CUDA-only code on CPU ranks over gloo, and nothing else.

`install()` in a program of your own, before Megatron is used, or

    torchrun --nproc-per-node 2 -m megatron_mone.cpu_emulation SCRIPT ARGS...

for anybody's script as it is. Every redirection is an entry of `PATCHES` that names the code of
Megatron that needs it; a test fails when the installed Megatron no longer does.
"""

from megatron_mone.common.patch import Patch
from megatron_mone.cpu_emulation.install import PATCHES, install, is_installed

__all__ = ["PATCHES", "Patch", "install", "is_installed"]
