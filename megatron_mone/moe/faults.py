"""Faults that a forward pass finds on its device, told once a step without waiting for each.

A fault is kept where it was found; `look` brings all of a step to the host in one copy and raises
the first. Who calls it: every optimizer, before its step (a hook for all of torch's); the layers at
the end of a step, for one that was skipped; model/loss_check.py, when Megatron refuses a loss;
pretrain.py, when it refuses a gradient, and after a step of evaluation.
A NaN spreads over ranks before anybody looks. So ranks that found something tell each other,
through the store by which they met, and all say what came first: the lowest micro-batch, then
layer, then rank. With a pipeline, a last stage that refuses its loss waits for no other stage, and
names the first expert of its own that was hit.
May touch: torch's optimizer hook, the default process group's store, once something was found.
"""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_mone.moe.recompute import in_recompute

DEFER: bool | None = None
"""Whether faults wait for `look`; None: those on a GPU do."""
PATIENCE_SECONDS = 2.0
"""That ranks which found something leave to others to say so too."""
_STORE_KEY = "megatron-mone/fault"


class NonFiniteExpertError(FloatingPointError):
    """An expert gave a NaN or an infinity; the message names rank, layer and expert."""


KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (NonFiniteExpertError, ValueError)
}
"""Of the errors that ranks tell each other."""


class _Found(NamedTuple):
    """A fault, in the order in which they are told: the forward pass of its step, the layer."""

    call: int
    layer: int
    rank: int
    kind: str
    words: str


class FaultWatch:
    """What one check of one layer found in the forward passes of a step.

    Args:
        error: what to raise, from the facts given to `keep` as lists of numbers.
        layer_number: 1-based, 0 where there is none.
        lasting: keep them in one place, and look there after every step: a CUDA graph that holds
            the check writes there again, and has no host say so.
    """

    def __init__(
        self,
        error: Callable[..., Exception],
        layer_number: Callable[[], int] = lambda: 0,
        lasting: bool = False,
    ) -> None:
        self.error, self._layer_number, self.lasting = error, layer_number, lasting
        self._calls = 0
        self._sizes: list[int] = []
        self._first: Tensor | None = None  # number of a forward pass, then its facts
        self._first_EX: Tensor | None = None  # of each expert its first: number, found, rows

    def keep(self, found_E: Tensor, *facts: Tensor) -> None:
        """Keep what a forward pass found, unless an earlier one of the step found something.

        Args:
            found_E: [E] int64, not 0 where there is a fault.
            facts: int64 vectors for the message, on the same device.
        """
        _watch_optimizers()
        self._calls += not in_recompute()
        self._sizes = [found_E.numel(), *(fact.numel() for fact in facts)]
        now = torch.nn.functional.pad(torch.cat((found_E, *facts)), (1, 0), value=self._calls)
        if self._first is None:
            self._first = now
        else:
            was_found = self._first[1 : 1 + found_E.numel()].any()
            first = torch.where(was_found, self._first, now)
            self._first = self._first.copy_(first) if self.lasting else first
        _kept[self] = None

    def keep_by(self, note: Callable[[Tensor, int], None], experts: int, like: Tensor) -> None:
        """As `keep`, where a kernel keeps it.

        Args:
            note: given [E, 3] int64 and the number of this forward pass, writes it, what it found
                and the rows of each expert that has found nothing yet in this step.
            experts: E.
            like: a tensor on their device.
        """
        _watch_optimizers()
        self._calls += not in_recompute()
        if self._first_EX is None:
            self._first_EX = like.new_zeros((experts, 3), dtype=torch.int64)
        note(self._first_EX, self._calls)
        _kept[self] = None

    def take(self) -> Tensor:
        """What was kept since the last call."""
        self._calls = 0
        if self._first_EX is not None:
            self._sizes = []
        first = self._first if self._first_EX is None else self._first_EX
        assert first is not None
        if self.lasting:
            taken = first.clone()
            self.forget()
        else:
            taken, self._first, self._first_EX = first, None, None
        return taken.flatten()

    def forget(self) -> None:
        """Empty what lasts."""
        for first in (self._first, self._first_EX):
            if first is not None and self.lasting:
                first.zero_()

    def read(self, numbers: list[int]) -> _Found | None:
        """The fault in what `take` gave, brought to the host; None where there is none."""
        if not self._sizes:
            return self._read_experts([numbers[i : i + 3] for i in range(0, len(numbers), 3)])
        call, *rest = numbers
        facts = []
        for size in self._sizes:
            facts.append(rest[:size])
            rest = rest[size:]
        if not any(facts[0]):
            return None
        error = self.error(*facts)
        return _Found(call, self._layer_number(), _rank(), type(error).__name__, str(error))

    def _read_experts(self, experts: list[list[int]]) -> _Found | None:
        """Of (number, found, rows) of each expert."""
        call = min((call for call, found, _ in experts if found), default=None)
        if call is None:
            return None
        found_E = [found * (of == call) for of, found, _ in experts]
        error = self.error(found_E, [rows for *_, rows in experts])
        return _Found(call, self._layer_number(), _rank(), type(error).__name__, str(error))


_kept: dict[FaultWatch, None] = {}
"""Watches that kept something since the last look."""


def deferred(tensor: Tensor) -> bool:
    """Whether a fault of this tensor waits for `look`."""
    return tensor.is_cuda if DEFER is None else DEFER


def look(refused: bool = False) -> None:
    """Raise the first fault since the last look, of any rank that found one; else nothing.

    Args:
        refused: whether the run ends anyway, so that it is worth waiting for what others found.

    Raises:
        NonFiniteExpertError, ValueError: as the check that found it would have.
    """
    watches = list(_kept)
    _kept.clear()
    _kept.update((watch, None) for watch in watches if watch.lasting)
    own = None
    if watches:
        kept = [watch.take() for watch in watches]
        numbers = torch.cat(kept).tolist()  # the one wait, and copy
        found = []
        for watch, first in zip(watches, kept, strict=True):
            found.append(watch.read(numbers[: first.numel()]))
            numbers = numbers[first.numel() :]
        own = min((fault for fault in found if fault is not None), default=None)
    if own is None and not (refused and _hooked):  # without the hook nobody here defers
        return
    first_fault = _first_of_ranks(own)
    if first_fault is not None:
        raise KINDS[first_fault.kind](first_fault.words)


def words() -> str | None:
    """What the first fault says where a run ends anyway; None where nobody found one."""
    try:
        look(refused=True)
    except tuple(KINDS.values()) as fault:
        return str(fault)
    return None


def _first_of_ranks(own: _Found | None) -> _Found | None:
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return own
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    if own is not None:
        store.set(f"{_STORE_KEY}/{_rank()}", json.dumps(own))
        store.set(f"{_STORE_KEY}/at/{store.add(_STORE_KEY, 1)}", str(_rank()))
    time.sleep(PATIENCE_SECONDS)
    ranks = [int(store.get(f"{_STORE_KEY}/at/{n + 1}")) for n in range(store.add(_STORE_KEY, 0))]
    told = [_Found(*json.loads(store.get(f"{_STORE_KEY}/{rank}"))) for rank in ranks]
    return min(told, default=None)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


_hooked: list[Any] = []


def _watch_optimizers() -> None:
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(lambda *_: look()))
