"""The growth of a process against tensors of known size."""

import ctypes
import os
import resource
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch

from megatron_mone.profiling import process_memory
from megatron_mone.profiling.process_memory import measure_growth

MEBIBYTE = 2**20
# Python objects and pages that are touched for the first time.
SLACK = 2 * MEBIBYTE

pytestmark = pytest.mark.skipif(
    not process_memory._reset_peak(), reason="the system's high-water mark cannot be reset"
)


def written(size):
    return torch.zeros(size, dtype=torch.uint8).fill_(1)


def test_growth_is_the_peak_and_not_the_end():
    with measure_growth() as growth:
        for size in (16, 64, 32):
            written(size * MEBIBYTE)
    assert growth.peak_bytes == pytest.approx(64 * MEBIBYTE, abs=SLACK)


def test_what_lives_before_and_after_is_not_counted():
    kept = written(128 * MEBIBYTE)
    with measure_growth() as growth:
        written(32 * MEBIBYTE)
    assert growth.peak_bytes == pytest.approx(32 * MEBIBYTE, abs=SLACK)
    del kept


def test_what_a_threads_heap_still_holds_at_the_start_is_not_counted():
    size, count = 24 * 1024, 1000
    left = Event()
    done = Event()

    def work():
        # Small blocks, on the heap of this thread; the last of them goes in the measured block.
        blocks = [written(size) for _ in range(count)]
        last = written(size)
        blocks.clear()
        left.set()
        done.wait()
        del last

    thread = Thread(target=work)
    thread.start()
    left.wait()
    with measure_growth() as growth:
        done.set()
        thread.join()
        written(32 * MEBIBYTE)
    assert growth.peak_bytes == pytest.approx(32 * MEBIBYTE, abs=SLACK)


def test_memory_that_is_never_written_is_not_counted():
    with measure_growth() as growth:
        torch.empty(256 * MEBIBYTE, dtype=torch.uint8)
    assert growth.peak_bytes < SLACK


def test_holes_of_the_heap_do_not_take_in_tensors():
    size, count = 100 * 1024, 400  # below glibc's threshold for mapping: they go on the heap
    kept = [written(size) for _ in range(2 * count)][::4]
    with measure_growth() as growth:
        small = [written(size) for _ in range(count)]
        del small
    assert growth.peak_bytes == pytest.approx(size * count, abs=SLACK)
    del kept


def test_plugging_ends_where_another_allocator_answers_malloc():
    taken = []

    def malloc(size):
        taken.append(size)
        assert sum(taken) <= MEBIBYTE
        return len(taken)

    counts = SimpleNamespace(fordblks=MEBIBYTE, hblks=0)  # glibc's, which then never change
    library = SimpleNamespace(malloc=malloc, mallinfo2=lambda: counts, free=lambda block: None)
    assert process_memory._plug_holes(library) == [1]


def test_the_heap_is_given_back():
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = process_memory._Mallinfo2
    blocks = [written(100 * 1024) for _ in range(800)]
    del blocks[::2]
    used = library.mallinfo2().uordblks
    with measure_growth():
        pass
    assert library.mallinfo2().uordblks == pytest.approx(used, abs=SLACK)


def test_growth_is_unknown_without_a_resettable_mark(monkeypatch, tmp_path):
    monkeypatch.setattr(process_memory, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    with measure_growth() as growth:
        pass
    assert growth.peak_bytes is None


def test_freed_blocks_stay_until_the_end_and_then_go():
    """The same pages come back in the block, whoever asks for them, and none are left after it."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    ctypes.CDLL(None).malloc_trim(0)  # or holes that other tests left would take the blocks in
    before = resident()
    with process_memory.keep_freed_blocks():
        written(128 * MEBIBYTE)
        assert resident() - before > 120 * MEBIBYTE
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        written(96 * MEBIBYTE)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 1000
    assert resident() - before < 16 * MEBIBYTE
