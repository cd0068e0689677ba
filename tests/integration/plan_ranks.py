"""Ranks of test_planned_against_ranks and test_sharded_against_ranks: what training steps held, and
the most of it at once.

`run` is a job of `tests.training_cases` whose routers send tokens as the planner assumes; each rank
writes its weights, gradients, optimizer state as the last micro-batch of a step begins, what other
floating tensors Python can reach then, and the most bytes that autograd kept at one time to
CASE/most-RANK.json, every number read from real tensors. It touches those files alone.
"""

import functools
import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests import training_cases


class Kept:
    """Bytes of the storages that autograd keeps for backward, each once, and their peak.

    Args:
        left_out: addresses of storages that are no activations: weights and what else stays.
        gathered: identities of storages that weights are gathered into.

    Attributes:
        most: bytes that were kept at one time.
    """

    def __init__(self, left_out: set[int], gathered: set[int]) -> None:
        self._left_out = left_out
        self._gathered = gathered
        self._uses: Counter[int] = Counter()
        self._now = 0
        self.most = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd holds in place of a tensor that it saves."""
        storage = tensor.untyped_storage()
        known = storage.data_ptr() in self._left_out or storage._cdata in self._gathered
        # Inside a backward pass there is a graph task: what a recompute saves is of that pass.
        is_weight = isinstance(tensor, torch.nn.Parameter) or known
        if torch._C._current_graph_task_id() != -1 or is_weight:
            return _Saved(tensor, None)
        return _Saved(tensor, self)

    @staticmethod
    def unpack(saved: Any) -> torch.Tensor:
        """The tensor again."""
        return saved.tensor

    def change(self, tensor: torch.Tensor, uses: int) -> None:
        """One more, or one less, use of a tensor's storage."""
        storage = tensor.untyped_storage()
        before = self._uses[storage.data_ptr()]
        after = self._uses[storage.data_ptr()] = before + uses
        if not before or not after:
            self._now += storage.nbytes() if after else -storage.nbytes()
            self.most = max(self.most, self._now)


class _Saved:
    """A saved tensor, counted until autograd lets go of it."""

    def __init__(self, tensor: torch.Tensor, kept: Kept | None) -> None:
        self.tensor, self._kept = tensor, kept
        if kept is not None:
            kept.change(tensor, 1)

    def __del__(self) -> None:
        if self._kept is not None:
            self._kept.change(self.tensor, -1)


_before: set[int] = set()


def built(build: Any) -> Any:
    """`setup_model_and_optimizer` that notes what is left of the runs before this one."""

    @functools.wraps(build)
    def noted(*arguments: Any, **keywords: Any) -> Any:
        _before.clear()
        _before.update(_sizes([value for value in gc.get_objects() if _is_float(value)]))
        return build(*arguments, **keywords)

    return noted


def measured(train_step: Any) -> Any:
    """`train_step` with what it found in CASE/most-RANK.json."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import get_args

    from megatron_mone.common.patch import Replaced
    from megatron_mone.profiling.ledger import WEIGHTS, persistent_tensors

    @functools.wraps(train_step)
    def step(*arguments: Any, **keywords: Any) -> Any:
        model, optimizer = arguments[2], arguments[3]
        before = persistent_tensors(model, optimizer)
        # Known by their addresses, which others would get if ZeRO 3 let them go within the step.
        alive = [t.untyped_storage() for tensors in before.values() for t in tensors]
        gathered = {t.untyped_storage()._cdata for t in before[WEIGHTS]}
        stay = dict(before)
        if hasattr(model[0], "param_and_grad_buffer"):
            del stay[WEIGHTS]  # whose memory Megatron FSDP gives up to others within the step
        kept = Kept(set().union(*(_sizes(tensors) for tensors in stay.values())), gathered)
        found: dict[str, int] = {}
        forward_step = schedules.forward_step

        def looked(*given: Any, **named: Any) -> Any:
            seen: set[int] = set()
            for kind, tensors in persistent_tensors(model, optimizer).items():
                sizes = _sizes(tensors)
                found[kind] = sum(size for address, size in sizes.items() if address not in seen)
                seen |= set(sizes)
            gc.collect()
            known = seen | _before
            others = _sizes([t for t in gc.get_objects() if _is_float(t)]).items()
            found["others"] = sum(size for address, size in others if address not in known)
            return forward_step(*given, **named)

        with (
            torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack),
            Replaced(schedules, "forward_step", looked),
        ):
            result = train_step(*arguments, **keywords)
        found["activations"] = kept.most
        del alive
        args = get_args()
        Path(args.tensorboard_dir, f"most-{args.rank}.json").write_text(json.dumps(found))
        return result

    return step


def _is_float(value: Any) -> bool:
    """Whether it is a tensor with values; messages of objects are bytes."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_floating_point()


def _sizes(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Bytes of the storages of some tensors, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def run(todo: str, folder: str) -> None:
    """The cases of the file `todo`, as training_cases._main; results under `folder`."""
    from megatron.training import training

    from megatron_mone.planning.tracing.stand_ins.values import known_routing

    training.setup_model_and_optimizer = built(training.setup_model_and_optimizer)
    training.train_step = measured(training.train_step)
    with known_routing():
        training_cases._main(todo, folder)
