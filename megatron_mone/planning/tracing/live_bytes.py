"""LiveBytes: how many bytes the tensors that a program makes hold at once, pass by pass.

Every storage counts once, from the operator that made it until Python lets go of it. Autograd under
a dispatch mode adds gradients out of place, so that a backward pass shows slightly more than it
needs without. May touch: `torch.UntypedStorage.resize_`, while entered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.patch import Replaced


class LiveBytes:
    """Counts storages that are noted, until they end.

    Args:
        pass_of: asked which pass is under way; peaks are kept by its answer.

    Attributes:
        now: bytes that are held.
        peaks: pass -> the most bytes that were held in it.
    """

    def __init__(self, pass_of: Callable[[], str]) -> None:
        self._pass_of = pass_of
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.now = 0
        self.peaks: dict[str, int] = {}

    def note(self, tensor: Tensor) -> None:
        """A tensor was made; one whose storage is known changes nothing."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._references[key] = weakref.ref(storage, lambda _gone: self._forget(key))
        self._change(key, storage.nbytes())

    @contextmanager
    def watching_sizes(self) -> Iterator[None]:
        """While it lasts, a storage that is resized (freed under its tensor) counts as it is."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, *size: Any) -> Any:
            result = resize(storage, *size)
            if storage._cdata in self._sizes:
                self._change(storage._cdata, storage.nbytes())
            return result

        with Replaced(torch.UntypedStorage, "resize_", resized):
            yield

    def _change(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        at = self._pass_of()
        self.peaks[at] = max(self.peaks.get(at, 0), self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._references[key]
