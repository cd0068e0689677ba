"""Training runs whose later steps are measured, each in another way.

All steps see the same batch and the learning rate is 0, so that they are the same step. After the
first, two tell what torch's allocator took (its own count; the lesser, for on a busy machine the
buffer of a collective that has ended may live on for a while), one the growth of the process, one
is the ledger's. A rank writes what it measured to CASE/memory-RANK.json.
"""

import ctypes
import functools
import itertools
from pathlib import Path

import torch

from megatron_mone.common.files import write_json
from megatron_mone.profiling import process_memory
from megatron_mone.profiling.ledger import MemoryLedger, persistent_tensors
from tests import training_cases

ALLOCATOR_STEPS, GROWTH_STEP, LEDGER_STEP = (2, 3), 4, 5


def _repeating(data_iterator, micro_batches):
    """The first `micro_batches` of the data, for ever."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    if data_iterator is None:
        return None
    first = [next(data_iterator) for _ in range(micro_batches)]
    return RerunDataIterator(itertools.cycle(first))


def count_all_threads():
    """Let torch's CPU allocator count what it hands out, in all threads, from here on."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def _allocator_peak(step):
    """(result, the most that the allocator's own count reached)."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        result = step()
    todo, peak = [*profile.kineto_results.experimental_event_tree()], 0
    while todo:
        event = todo.pop()
        todo += event.children
        if event.name == "[memory]":
            peak = max(peak, event.extra_fields.total_allocated)
    return result, peak


def watch(train_step):
    """`train_step` with the measurements; a new run begins with a new model."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    run = {"model": None}

    @functools.wraps(train_step)
    def watched(forward_step, data_iterator, model, optimizer, *args, **kwargs):
        if run["model"] is not model:
            batches = _repeating(data_iterator, get_num_microbatches())
            run.update(model=model, step=0, batches=batches, found={})
        run["step"] += 1
        step = functools.partial(
            train_step, forward_step, run["batches"], model, optimizer, *args, **kwargs
        )
        found = run["found"]
        if run["step"] in ALLOCATOR_STEPS:
            result, peak = _allocator_peak(step)
            found["allocator_peak"] = min(peak, found.get("allocator_peak", peak))
        elif run["step"] == GROWTH_STEP:
            with process_memory.measure_growth() as growth:
                result = step()
            found["growth"] = growth.peak_bytes
        elif run["step"] == LEDGER_STEP:
            with MemoryLedger(lambda: persistent_tensors(model, optimizer)) as ledger:
                result = step()
            found.update(base=ledger.base_bytes, record=ledger.record())
            folder = Path(get_args().tensorboard_dir)
            write_json(folder / f"memory-{torch.distributed.get_rank()}.json", found)
            run["model"] = None
        else:
            result = step()
        return result

    return watched


def main(todo: str, folder: str) -> None:
    """As training_cases: the cases of a file, one after another."""
    process_memory.share_one_heap()
    count_all_threads()
    from megatron.training import training

    training.train_step = watch(training.train_step)
    training_cases._main(todo, folder)
