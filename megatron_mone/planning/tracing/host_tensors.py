"""Which tensors without values lie in the host's memory, and what crosses between it and a device.

A tensor without values has no device that says so. Here those that a program pins, or makes with
`device="cpu"` in words, are the host's, and so is what is made of nothing else; a copy between the
two is `link.to_host` or `link.to_device`, one op of the bytes that cross. Of another type than its
source it is converted on the host, in memory that is not pinned, and such memory the driver copies
once more (aten/src/ATen/native/cuda/Copy.cu: "Type conversions are performed on the CPU for CPU-GPU
copies"). What else runs on the host's tensors is an op named `host.` and its own name. Touches
nothing; `stand_ins/host.py` tells it which tensors a program pins.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mone.planning.tracing.trace import HOST, TO_DEVICE, TO_HOST


class HostTensors:
    """Storages of the host's tensors."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._pinned: set[int] = set()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._known)

    def add(self, tensor: Tensor, *, pinned: bool = False) -> Tensor:
        """Know a tensor as the host's; it comes back."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._known[key] = weakref.ref(storage, lambda _gone: self._forget(key))
        if pinned:
            self._pinned.add(key)
        return tensor

    def _forget(self, key: int) -> None:
        del self._known[key]
        self._pinned.discard(key)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is the host's."""
        return bool(self._known) and self.holds_storage(tensor.untyped_storage()._cdata)

    def holds_storage(self, key: int) -> bool:
        """Whether a storage is, by identity."""
        return key in self._known

    def saw(
        self, func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> list[tuple[str, int, int]] | None:
        """Place what an operator made; what it was, if it was the host's or a copy between both.

        Args:
            func: the operator.
            inputs, outputs: its tensors.

        Returns:
            (name, bytes read, bytes written) of each op to take down; None: the device's.
        """
        if not self._known:
            return None
        held = [self.holds(tensor) for tensor in inputs]
        if func.overloadpacket is torch.ops.aten.copy_ and held[0] != held[1]:
            return self._crossing(*inputs[:2])
        # Integers have values, and are the host's where it was said so.
        if not any(held) or any(
            t.is_meta for t, is_held in zip(inputs, held, strict=True) if not is_held
        ):
            return None
        for output in outputs:
            self.add(output)
        read, written = (sum(t.nbytes for t in tensors) for tensors in (inputs, outputs))
        return [(f"{HOST}{func.overloadpacket}", read, written)]

    def _crossing(self, to: Tensor, source: Tensor) -> list[tuple[str, int, int]]:
        to_host = self.holds(to)
        here, there = (to, source) if to_host else (source, to)
        size = there.nbytes
        found = [(TO_HOST if to_host else TO_DEVICE, size, size)]
        converted = to.dtype != source.dtype
        if converted:
            read, written = (size, here.nbytes) if to_host else (here.nbytes, size)
            found.append((f"{HOST}convert", read, written))
        if converted or here.untyped_storage()._cdata not in self._pinned:
            found.append((f"{HOST}stage", size, size))
        return found
