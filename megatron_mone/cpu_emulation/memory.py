"""The memory calls of `torch.cuda`, answered with this process's resident memory, in bytes.

The numbers include everything the process holds (the interpreter, libraries, the C++ heap), not
tensors alone: they are true for the rank, and an upper bound for its tensors.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_mone.common.patch import Patch, megatron_source, raises
from megatron_mone.cpu_emulation.cuda_calls import put

_RU_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes(device: Any = None) -> int:
    """Resident set size of this process now."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes(device: Any = None) -> int:
    """Largest resident set size since the start, or since `reset_peak` where the system allows."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RU_MAXRSS_BYTES


def reset_peak(device: Any = None) -> None:
    """Start the peak again from the present size (Linux; elsewhere the peak is the process's)."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return


def memory_stats(device: Any = None) -> dict[str, int]:
    """Return the keys of `torch.cuda.memory_stats` that Megatron and PyTorch's reports read."""
    now, peak = resident_bytes(), peak_resident_bytes()
    stats: dict[str, int] = {}
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes"):
        stats[f"{kind}.all.current"], stats[f"{kind}.all.peak"] = now, peak
    # Counts of blocks have no meaning for a process; 0 keeps the readers of the keys alive.
    for kind in ("allocation", "segment", "active", "inactive_split"):
        stats[f"{kind}.all.current"] = stats[f"{kind}.all.peak"] = 0
    stats["num_alloc_retries"] = stats["num_ooms"] = 0
    return stats


def _mem_get_info(device: Any = None) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


CALLS: dict[str, Any] = {
    "memory_allocated": resident_bytes,
    "memory_reserved": resident_bytes,
    "max_memory_allocated": peak_resident_bytes,
    "max_memory_reserved": peak_resident_bytes,
    "memory_stats": memory_stats,
    "mem_get_info": _mem_get_info,
    "reset_peak_memory_stats": reset_peak,
    "reset_max_memory_allocated": reset_peak,
    "empty_cache": lambda: None,
}
"""Functions of `torch.cuda` (and `torch.cuda.memory`) and what stands in for them."""


PATCHES = (
    Patch(
        name="memory-calls",
        needed_by="megatron/training/utils/common_utils.py: report_memory",
        why="memory reports are zero or raise where there is no device",
        apply=lambda: put(CALLS, torch.cuda, torch.cuda.memory),
        still_needed=lambda: (
            (
                raises(lambda: torch.cuda.max_memory_allocated())
                or torch.cuda.max_memory_allocated() == 0
            )
            and "max_memory_allocated" in megatron_source("training/utils/common_utils.py")
        ),
    ),
)
