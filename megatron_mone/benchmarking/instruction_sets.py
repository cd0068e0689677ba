"""Which vector code a race runs: the machine's class, and how to run a lower one's.

Imports nothing heavy: `limit` must come before torch is asked what it runs.
"""

import os
from pathlib import Path

LIMITS = {
    "avx2": {
        "MONE_KERNEL_SET": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}
"""Variables that hold our kernels, torch's own, MKL and oneDNN to the code of a class."""
TOLD = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd")


def limit(machine_class: str) -> None:
    """Run what a machine of that class runs, whatever more this one has."""
    os.environ.update(LIMITS[machine_class])


def class_here() -> str:
    """avx2, avx512 or amx by what torch runs on this CPU, sm_90 and the like of a GPU."""
    import torch

    from megatron_mone.kernels.measured import machine_class

    found = machine_class("cuda" if torch.cuda.is_available() else "cpu")
    return "amx" if found == "avx512+amx" else found


def facts() -> dict[str, str]:
    """Label -> value: the class, and what the processor has and the libraries run."""
    import torch

    from megatron_mone.kernels.cpu import native
    from megatron_mone.kernels.cpu.backend import available

    ours = native.default_set() if available()[0] else "none"
    held = [f"{name}={os.environ[name]}" for name in LIMITS["avx2"] if name in os.environ]
    runs = f"our kernels {ours}, torch {torch.backends.cpu.get_cpu_capability()}"
    told = [f"processor {' '.join(_flags()) or 'unknown'}", runs, *([", ".join(held)] * bool(held))]
    return {"Class": class_here(), "Instructions": "; ".join(told)}


def _flags() -> list[str]:
    """Those of TOLD that the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    words = next((set(s.split()) for s in lines if s.startswith(("flags", "Features"))), set())
    return [flag for flag in TOLD if flag in words]
