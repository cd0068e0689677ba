"""Random numbers: the CPU's default generator plays the device's.

Megatron keeps one random state per purpose (tensor-parallel weights, experts, replicated parts) and
swaps it in and out of the *CUDA* generator around the operations that draw. Operations here draw
from the CPU's default generator, so that one takes the CUDA generator's place: seeds, states in a
checkpoint, dropout and initialisation then follow Megatron's own code.

On a GPU the host's generator is another one. Its users must not advance the device's, or ranks
that load data would drop other activations than their tensor-parallel peers: they run in
`host_generator()`.
"""

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from megatron_mone.common.patch import Patch, megatron_source, raises, wrapping
from megatron_mone.cpu_emulation.cuda_calls import put

_host_state: torch.Tensor | None = None


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    for state in new_states:
        _set_rng_state(state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed: it calls torch.cuda.manual_seed_all, which is this function.
    torch.default_generator.manual_seed(int(seed))


CALLS: dict[str, Any] = {
    "get_rng_state": _get_rng_state,
    "get_rng_state_all": lambda: [_get_rng_state()],
    "set_rng_state": _set_rng_state,
    "set_rng_state_all": _set_rng_state_all,
    "manual_seed": _manual_seed,
    "manual_seed_all": _manual_seed,
    "initial_seed": lambda: torch.default_generator.initial_seed(),
}
"""Functions of `torch.cuda` (and `torch.cuda.random`) and what stands in for them."""


def _apply_tracker() -> None:
    from megatron.core.tensor_parallel import random

    def get_state(
        device: Any = "cuda", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return _get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        _set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # `fork` warns when the CPU's state moved; here that state is the one being forked.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


@contextlib.contextmanager
def host_generator() -> Iterator[None]:
    """Draw from the host's own random state inside; the device's is untouched.

    The host's state starts as the device's was at the first use, as one seed sets both on a GPU.
    """
    global _host_state
    device_state = torch.default_generator.get_state()
    torch.default_generator.set_state(device_state if _host_state is None else _host_state)
    try:
        yield
    finally:
        _host_state = torch.default_generator.get_state()
        torch.default_generator.set_state(device_state)


def _apply_loader() -> None:
    from torch.utils.data import dataloader

    original = dataloader._BaseDataLoaderIter.__init__

    @functools.wraps(original)
    def init(self: Any, loader: Any) -> None:
        with host_generator():
            original(self, loader)

    dataloader._BaseDataLoaderIter.__init__ = init  # type: ignore[method-assign]


def _loader_draws_from_default() -> bool:
    loader: Any = torch.utils.data.DataLoader([0, 1])  # type: ignore[arg-type]
    before = torch.get_rng_state()
    iter(loader)
    return not torch.equal(before, torch.get_rng_state())


def _without_fp8(init: Any) -> Any:
    @functools.wraps(init)
    def __init__(self: Any, fp8: Any = None) -> None:
        init(self, fp8 or None)

    return __init__


PATCHES = (
    Patch(
        name="rng-states",
        needed_by="megatron/core/tensor_parallel/random.py: CudaRNGStatesTracker.add",
        why="torch.cuda.get_rng_state raises, and seeding CUDA would not seed what draws here",
        apply=lambda: put(CALLS, torch.cuda, torch.cuda.random),
        still_needed=lambda: (
            raises(lambda: torch.cuda.get_rng_state())
            and "torch.cuda.get_rng_state()" in megatron_source("core/tensor_parallel/random.py")
        ),
    ),
    Patch(
        name="rng-tracker",
        needed_by="megatron/core/tensor_parallel/random.py: _set_cuda_rng_state",
        why="the tracker sets torch.cuda.default_generators[i], of which there are none",
        apply=_apply_tracker,
        still_needed=lambda: (
            len(torch.cuda.default_generators) == 0
            and "torch.cuda.default_generators[idx]"
            in megatron_source("core/tensor_parallel/random.py")
        ),
    ),
    Patch(
        name="rng-data-loader",
        needed_by="torch/utils/data/dataloader.py: _BaseDataLoaderIter.__init__ (base seed)",
        why="the loader's seed is drawn on TP rank 0 only; drawn from the generator that plays the "
        "device's, it would set the replicated dropout of TP ranks apart",
        apply=_apply_loader,
        still_needed=_loader_draws_from_default,
    ),
    wrapping(
        "recompute-without-output",
        "megatron.core.tensor_parallel.random: CheckpointWithoutOutput.__init__",
        _without_fp8,
        why="its default fp8=False counts as fp8, for it is not None: the norm's recompute "
        "(recompute_modules = layernorm) then asks Transformer Engine, which is not there",
        needed_while="self.fp8 = fp8 is not None",
    ),
)
