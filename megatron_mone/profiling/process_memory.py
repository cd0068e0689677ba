"""What the process really took during a block: the growth of its resident memory.

Reads and resets the kernel's own high-water mark (Linux, /proc/self), and sets glibc's allocator so
that freed tensors leave the process at once; touches nothing else. The growth counts pages: Python
objects, the buffers of gloo and BLAS and code that is run for the first time are in it, and memory
that was allocated but never written is not. Measure a step like one that ran before, without a
profiler, whose events would be counted too.
"""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5)

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
# Blocks of at least this size are mapped for themselves and unmapped when freed.
_MAPPED_BYTES = 32 * 1024
# Where glibc's own adjustment ends after it has freed one large block (mallopt(3)).
_GLIBC_MMAP_THRESHOLD = 32 * 1024 * 1024
_GLIBC_MMAP_MAX = 65536
_LARGEST_HOLE = 2**30


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of malloc.h; hblks counts the mapped blocks."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@dataclass
class Growth:
    """Most bytes of the block beyond its end; None until it ends, or where unknown."""

    peak_bytes: int | None = None


def share_one_heap() -> None:
    """Let threads made from here on allocate where the main thread does (glibc).

    To be called before process groups are made: gloo's threads otherwise have heaps of their own,
    which keep a few MB of what was freed in them, at times that differ from step to step.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_ARENA_MAX, 1)


@contextmanager
def keep_freed_blocks() -> Iterator[None]:
    """Let freed blocks stay with the process while the block runs (glibc), and go at its end.

    For timing: pages that are new to a process cost it more than many a computation on them, and
    which allocation gets them depends on what others have freed before. glibc's thresholds stay
    fixed after it at the values that its own adjustment tends to.
    """
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_MAX, _GLIBC_MMAP_MAX)
        library.mallopt(_M_MMAP_THRESHOLD, _GLIBC_MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _GLIBC_MMAP_THRESHOLD)
        gc.collect()
        library.malloc_trim(0)


@contextmanager
def measure_growth() -> Iterator[Growth]:
    """Measure how far above its end the block's resident memory has been.

    For a block that leaves alive what was alive before, as a step that is not the first. Its end is
    the better footing: at the start, heaps of other threads may still hold what earlier steps
    freed, and nothing but a free in those threads makes them let go. Where threads allocate that
    were made before `share_one_heap`, measure two like steps, one right after the other, and take
    the second's growth.

    Allocations are slower in the block, and glibc's thresholds stay fixed after it at the values
    that its own adjustment tends to. Where the system has no resettable high-water mark (it is not
    Linux, or does not let a process write clear_refs), `peak_bytes` stays None.
    """
    growth = Growth()
    gc.collect()
    with _returned_at_once():
        resettable = _reset_peak()
        yield growth
        if resettable:
            growth.peak_bytes = _peak_beyond_now()


@contextmanager
def _returned_at_once() -> Iterator[None]:
    """Let freed blocks leave the process, where its allocator can be told to (glibc from 2.33)."""
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "mallinfo2")):
        yield
        return
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.mallinfo2.restype = _Mallinfo2
    library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    library.mallopt(_M_TRIM_THRESHOLD, _MAPPED_BYTES)
    plugs = _plug_holes(library)
    try:
        yield
    finally:
        for plug in plugs:
            library.free(plug)
        library.mallopt(_M_MMAP_THRESHOLD, _GLIBC_MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _GLIBC_MMAP_THRESHOLD)


def _plug_holes(library: Any) -> list[int]:
    """Take the heap's large free blocks, without writing to them; returns their addresses.

    malloc maps a block only where no free one fits. What earlier steps left free on the heap would
    take in tensors and stay in the process when they are freed.
    """
    plugs: list[int] = []
    free = library.mallinfo2().fordblks  # an end also where another allocator stands before glibc's
    size = _LARGEST_HOLE
    while size >= _MAPPED_BYTES:
        mapped = library.mallinfo2().hblks
        block = library.malloc(size) if size <= free else None
        if block is not None and library.mallinfo2().hblks == mapped:
            plugs.append(block)
            free -= size
        else:
            library.free(block)
            size //= 2
    return plugs


def _reset_peak() -> bool:
    """Set the high-water mark to the present size; False where that cannot be done."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_beyond_now() -> int:
    """Bytes from the present resident size up to the high-water mark."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    peak, now = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
    return peak - now
