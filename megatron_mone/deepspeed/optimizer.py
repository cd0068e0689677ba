"""DeepSpeed's engine with the surface of a Megatron optimizer.

Megatron's own optimizer is made first: it chooses parameter groups, learning rates and the kind of
optimizer. Its groups then become one plain optimizer, which DeepSpeed takes and shards. In
checkpoints state has Megatron's form, so that either engine goes on from the other's: it is
gathered into Megatron's optimizer to be saved, and dealt out from it after a load. May touch:
DeepSpeed's engine, the optimizer state in it.
"""

import contextlib
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_mone.checkpoint.optimizer_layout import BY_PARAMETER, SHARDING, name_by_parameter
from megatron_mone.checkpoint.verify import CheckpointRefusedError
from megatron_mone.deepspeed import state
from megatron_mone.deepspeed.gradient_norm import count_once
from megatron_mone.deepspeed.model import EngineModel

_OWN = ("params", "moe", "name")  # of a group, DeepSpeed's or of one optimizer


class EngineOptimizer(MegatronOptimizer):
    """Steps by DeepSpeed.

    Args:
        make: Megatron's optimizer of the model, not sharded.
        model: wrapped, not started yet.
        args: Megatron's.
    """

    is_stub_optimizer = False

    def __init__(
        self, make: Callable[[], MegatronOptimizer], model: EngineModel, args: Namespace
    ) -> None:
        self._make = make
        self.model = model
        whole = make()
        super().__init__(_joined(_parts(whole)), whole.config)
        _let_go(model)
        self.engine = model.start(self.optimizer, args)
        count_once(self.engine, model.groups, args.clip_grad)
        self._one = torch.ones(1, device=next(model.module.parameters()).device)

    @property
    def chained_optimizers(self) -> list[MegatronOptimizer]:
        """Itself alone."""
        return [self]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """DeepSpeed does, at the end of a step."""

    def get_loss_scale(self) -> Tensor:
        """[1], 1: bf16 and fp32 need none."""
        return self._one

    def prepare_grads(self) -> bool:
        """Not apart from the step."""
        return False

    def step_with_ready_grads(self) -> bool:
        """Not apart from the step."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        """Reduce what is not reduced yet, clip, step, gather; (done, gradient norm, None)."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return self.engine._step_applied, None if norm is None else float(norm), None

    def reload_model_params(self, state_dict: Any = None) -> None:
        """After weights were loaded without optimizer state."""
        state.take_weights(self.engine)

    def state_dict(self) -> Any:
        """In Megatron's form."""
        with self._whole(filled=True) as whole:
            return whole.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """From Megatron's form."""
        with self._whole(filled=False) as whole:
            whole.load_state_dict(state_dict)
            state.deal(self.engine, _held(whole), _parts(whole))
            for mine, other in self._groups(whole):
                mine.update({key: other[key] for key in other if key not in _OWN})

    def sharded_state_dict(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False,
        metadata: dict | None = None, **named: Any,
    ) -> ShardedStateDict:  # fmt: skip
        """In Megatron's form.

        Raises:
            CheckpointRefusedError: one to load was saved in pieces of other gradient buffers.
        """
        form = (metadata or {}).get(SHARDING)
        if is_loading and form not in (None, BY_PARAMETER):
            raise CheckpointRefusedError(
                f"the checkpoint's optimizer state is {form}, in pieces of Megatron's gradient "
                "buffers: load it with --engine megatron and save it with "
                "--dist-ckpt-optim-fully-reshardable, or pass --no-load-optim"
            )
        with self._whole(filled=not is_loading) as whole:
            found = whole.sharded_state_dict(
                model_sharded_state_dict, is_loading=is_loading, metadata=metadata, **named
            )
            if not is_loading:
                _add_weights(found, model_sharded_state_dict, _parts(whole))
                name_by_parameter(found)
            return found

    @contextlib.contextmanager
    def _whole(self, *, filled: bool) -> Iterator[Any]:
        """Megatron's optimizer of whole parameters, with the engine's state."""
        with state.whole_parameters(self.engine):
            whole = self._make()
            for mine, other in self._groups(whole):
                other.update({key: mine[key] for key in mine if key not in _OWN})
            if filled:
                state.gather(self.engine, _held(whole), _parts(whole))
            try:
                yield whole
            finally:
                _let_go(self.model)

    def _groups(self, whole: Any) -> Iterator[tuple[dict, dict]]:
        """The engine's parameter groups, each with the one that it was made of."""
        theirs = (group for part in _parts(whole) for group in part.optimizer.param_groups)
        return zip(self.engine.basic_optimizer.param_groups, theirs, strict=True)


def _let_go(model: EngineModel) -> None:
    """Of the float32 copies that Megatron's optimizer hangs on each parameter, whole on every rank
    (megatron/core/optimizer/optimizer.py: `param.main_param = main_param`)."""
    for parameter in model.module.parameters():
        vars(parameter).pop("main_param", None)


def _parts(whole: Any) -> Sequence[Any]:
    return getattr(whole, "chained_optimizers", [whole])


def _add_weights(
    found: dict[Any, Any], model: ShardedStateDict, parts: Sequence[Any]
) -> None:  # fmt: skip
    """Float32 weights beside their moments: a distributed optimizer loads them together."""
    for number, part in enumerate(parts):
        own = found if len(parts) == 1 else found[number]
        if "state" not in own:  # bf16: they are there
            continue
        weights = part.get_parameters()
        known = get_param_id_to_sharded_param_map(model, weights)
        for place, moments in own["state"].items():
            if isinstance(place, int):
                moments["param"] = make_sharded_optimizer_tensor(
                    known[place], weights[place], "optimizer.state.param"
                )


def _joined(parts: Sequence[Any]) -> torch.optim.Optimizer:
    """One optimizer of the model's own parameters, in the groups of all parts."""
    groups = []
    for part in parts:
        masters = {id(main): own for own, main in _held_of(part)}
        for group in part.optimizer.param_groups:
            own = [masters.get(id(one), one) for one in group["params"]]
            groups.append({**group, "params": own})
    for group in groups:
        names = {getattr(one, "group_name", "") for one in group["params"]}
        if group.get("is_expert_parallel"):
            group |= {"moe": True, "name": names.pop()}
    kind, defaults = type(parts[0].optimizer), parts[0].optimizer.defaults
    known = inspect.signature(kind).parameters
    return kind(groups, **{key: value for key, value in defaults.items() if key in known})


def _held(whole: Any) -> list[tuple[Parameter, Tensor]]:
    """The model's parameters, each with what Megatron's optimizer steps: itself, or its fp32."""
    return [pair for part in _parts(whole) for pair in _held_of(part)]


def _held_of(part: Any) -> list[tuple[Parameter, Tensor]]:
    if not hasattr(part, "float16_groups"):
        return [(one, one) for group in part.optimizer.param_groups for one in group["params"]]
    own, main = [], []
    for theirs, ours in (
        (part.float16_groups, part.fp32_from_float16_groups),
        (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups),
    ):
        own += [one for group in theirs for one in group]
        main += [one for group in ours for one in group]
    return list(zip(own, main, strict=True))
