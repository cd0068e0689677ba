"""What an implementation keeps for its backward, and the most it allocates.

`saved_bytes` counts storages, each once: those that autograd saves (saved_tensors_hooks) and those
on the contexts of autograd functions; without parameters, inputs and other storages given.
`Peaks` counts what torch's allocator hands out beyond what lived at the start: on a CPU from the
profiler's allocation events (allocations that BLAS and oneDNN make for themselves are not torch's
and are not seen), on CUDA from the caching allocator's counters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peaks:
    """Bytes beyond what lived before the forward.

    Attributes:
        forward: most during the forward.
        backward: most during the backward, what the forward left alive included.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Most of both."""
        return max(self.forward, self.backward)


def saved_bytes(forward: Callable[[], Tensor], given: set[int]) -> int:
    """Bytes kept for the backward of one forward.

    Args:
        forward: returns the output with its graph.
        given: addresses of storages that are not counted (parameters, inputs).
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # Detached: the graph keeps what is returned here, and a tensor that leads back to the graph
        # would make it immortal. `kept` also keeps addresses from being used again.
        kept.append(tensor.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    kept += _on_contexts(output.grad_fn)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in given)


def measure_peaks(forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Peaks:
    """Peaks of one forward and of the backward of its output."""
    if torch.cuda.is_available():
        return _cuda_peaks(forward, backward)
    output, high, left = _allocated(forward)
    _, high_backward, _ = _allocated(lambda: backward(output))
    return Peaks(high, left + high_backward)


def _allocated(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """(result, most bytes beyond the start at any time, bytes still allocated at the end)."""
    # torch.profiler itself adds nothing but labels; this is the part that records allocations.
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        result = call()
    events = profile.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    level = high = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        level += size
        high = max(high, level)
    return result, high, level


def _cuda_peaks(forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Peaks:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = forward()
    high = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    result = backward(output)
    high_backward = torch.cuda.max_memory_allocated() - before
    del result
    return Peaks(high, high_backward)


def _on_contexts(root: Any) -> list[Tensor]:
    """Tensors held by attributes of the graph's nodes (`ctx.name = tensor`)."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += _tensors(getattr(node, "__dict__", {}).values())
        todo += [child for child, _ in node.next_functions]
    return found


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
        elif is_dataclass(value) and not isinstance(value, type):
            found += _tensors(getattr(value, field.name) for field in fields(value))
    return found
