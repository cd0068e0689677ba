"""Loads optimizer state that was saved under another number or kind of optimizers.

With expert parallelism Megatron builds two optimizers, one for expert parameters, and without it
one for all. Their tensors are saved by parameter and load under any layout; the parameter groups
(learning rate, weight decay, step) are saved by optimizer, and Megatron 0.19 stops at
`KeyError: 'optimizer'` or "Expected 2 entries". Here the saved groups are handed to the optimizers
that exist.

Of the kinds, a distributed optimizer saves by parameter with --dist-ckpt-optim-fully-reshardable,
as DeepSpeed's engine does; its names and groups differ from a plain optimizer's. May touch:
Megatron's ChainedOptimizer, its mixed-precision optimizer.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_mone.checkpoint.schedule import fit_groups
from megatron_mone.common.patch import in_source, wrapping

State = dict[Any, Any]


def _fitted(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    from megatron.training import get_args

    @functools.wraps(load_state_dict)
    def fitted(self: Any, state: Any) -> None:
        if isinstance(state, dict):
            fit_groups(list(_with_param_groups(state)), self.chained_optimizers, get_args())
            state = fit_state(state, self.chained_optimizers)
        load_state_dict(self, state)

    return fitted


def _with_a_reason(load: Callable[..., Any]) -> Callable[..., Any]:
    """Muon and its like are several optimizers also without expert parallelism: Megatron joins the
    groups of two that are not the same (dict_utils.merge) before `fit_state` sees them."""

    @functools.wraps(load)
    def loaded(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except ValueError as error:
            if "Cannot merge" not in str(error) or "'optimizer'" not in str(error):
                raise
            raise ValueError(
                "the checkpoint's optimizer state is parted otherwise than this run's: with "
                "optimizers other than adam and sgd, state saved with expert_model_parallel_size = "
                "1 loads with 1 alone, and state saved with more loads with more: keep to that, or "
                "pass --no-load-optim"
            ) from error

    return loaded


SHARDING, BY_PARAMETER = "distrib_optim_sharding_type", "fully_reshardable"
"""An entry of a checkpoint's metadata, and what it says of state that lies by parameter."""
_STATE = "optimizer.state"
_FORM = "param_state_sharding_type"  # of what a distributed optimizer saved


def _named(sharded_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(sharded_state_dict)
    def named(
        self: Any, model: Any, is_loading: bool = False, metadata: dict | None = None, **more: Any
    ) -> Any:
        state = sharded_state_dict(self, model, is_loading=is_loading, metadata=metadata, **more)
        if is_loading and (metadata or {}).get(SHARDING) == BY_PARAMETER:
            name_by_parameter(state)
        return state

    return named


def name_by_parameter(state: Any) -> None:
    """Call float32 weights in a sharded state as a distributed optimizer does."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    for one in nested_values(state):
        if isinstance(one, ShardedBase):
            one.key = one.key.replace(f"{_STATE}.fp32_param.", f"{_STATE}.param.", 1)


PATCHES = (
    wrapping(
        "optimizer-groups",
        "megatron.core.optimizer.optimizer: ChainedOptimizer.load_state_dict",
        _fitted,
        why="state saved by one optimizer does not load into two, nor the other way",
        needed_while="if len(self.chained_optimizers) != len(state_dict):",
    ),
    wrapping(
        "master-weights",
        "megatron.core.optimizer.optimizer: Float16OptimizerWithFloat16Params.sharded_state_dict",
        _named,
        why="a plain optimizer looks for float32 weights by another name",
        needed_while="optimizer.state.fp32_param",
    ),
    wrapping(
        "merged-groups",
        "megatron.training.checkpointing: dist_checkpointing.load",
        _with_a_reason,
        why="where it cannot join groups of several optimizers it says so of lists",
        needed_while=in_source("core/dist_checkpointing/dict_utils.py", "Cannot merge two lists"),
    ),
)


def fit_state(state: State, optimizers: list[Any]) -> State:
    """The loaded state in the form that `optimizers` expect.

    Args:
        state: by optimizer number where several were saved, else of the one; the tensors already
            lie as `optimizers` asked for them.
        optimizers: of this run.

    Raises:
        ValueError: a parameter group that no saved group matches.
    """
    numbers = sorted(key for key in state if isinstance(key, int))
    saved = [state[n] for n in numbers if _holds_groups(state[n])]
    if _holds_groups(state):
        saved.append({key: value for key, value in state.items() if key not in numbers})
    if len(saved) == len(optimizers):
        kept = [_of_its_kind(*pair) for pair in zip(saved, optimizers, strict=True)]
        if all(one is other for one, other in zip(kept, saved, strict=True)):
            return state
        return kept[0] if len(kept) == 1 else dict(enumerate(kept))
    if len(optimizers) == 1:
        asked = [{key: value for key, value in state.items() if key not in numbers}]
    else:
        asked = [state.get(n, {}) for n in range(len(optimizers))]
    fitted = [
        _with_groups(own, saved, optimizer)
        for own, optimizer in zip(asked, optimizers, strict=True)
    ]
    return fitted[0] if len(fitted) == 1 else dict(enumerate(fitted))


def _with_param_groups(state: State) -> Iterator[State]:
    """The saved states, of one optimizer or of several, where they hold their groups."""
    for part in (state, *(state[key] for key in state if isinstance(key, int))):
        if _holds_groups(part):
            yield _inner(part)


def _inner(state: State) -> State:
    """Where a state holds its groups: itself (FP32Optimizer), or under "optimizer"."""
    inner = state.get("optimizer")
    return inner if isinstance(inner, dict) else state


def _of_its_kind(state: State, optimizer: Any) -> State:
    """A loaded state in the form of the optimizer that loads it: its tensors lie as this asked, its
    groups as another kind saved them.

    A plain optimizer has groups at the top (FP32Optimizer) or under "optimizer", and the step
    beside the moments; a distributed one has groups under "optimizer", and the step in each.
    """
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
    from megatron.core.optimizer.optimizer import FP32Optimizer

    distributed = isinstance(optimizer, DistributedOptimizer)
    if distributed == (_FORM in state):
        return state
    nested = state.get("optimizer") or {}
    flat = {key: state[key] for key in ("state", "param_groups") if key in state}
    saved = next((one for one in (flat, nested) if _has_settings(one)), None)
    if saved is None:
        return state
    steps = [group["step"] for group in saved["param_groups"] if "step" in group]
    step = steps[0] if steps else saved.get("state", {}).get("common_step")
    groups = [{**group, "step": None if step is None else float(step)}
              for group in _matched_groups([saved], optimizer)]  # fmt: skip
    rest = {key: value for key, value in state.items() if key not in flat}
    if distributed:
        return {_FORM: BY_PARAMETER, **rest, "optimizer": {"param_groups": groups}}
    plain = isinstance(optimizer, FP32Optimizer)
    moments = (flat if plain else nested).get("state", {})
    if not HAVE_APEX_OR_TE:  # torch's optimizers count steps by parameter
        groups = [{key: group[key] for key in group if key != "step"} for group in groups]
        moments = {**moments, "common_step": torch.as_tensor(step)}
    inner = {"param_groups": groups, "state": moments}
    return inner if plain else {**rest, "optimizer": inner}


def _has_settings(state: State) -> bool:
    """Whether groups hold what was saved, not just which parameters are asked for."""
    return any("lr" in group for group in state.get("param_groups", ()))


def _holds_groups(state: Any) -> bool:
    return isinstance(state, dict) and "param_groups" in _inner(state)


def _with_groups(own: State, saved: list[State], optimizer: Any) -> State:
    """`own`, whose tensors are right, with the groups and the scalars of the saved states."""
    first, nested = saved[0], "optimizer" in saved[0]
    result = {**{key: value for key, value in first.items() if key not in own}, **own}
    inner = dict(_inner(own)) if nested == ("optimizer" in own) else {}
    inner["param_groups"] = list(_matched_groups(saved, optimizer))
    steps = (_inner(s).get("state", {}).get("common_step") for s in saved)
    common_step = next((step for step in steps if step is not None), None)
    if common_step is not None:
        inner["state"] = {**inner.get("state", {}), "common_step": common_step}
    if nested:
        return {**result, "optimizer": inner}
    return {**result, **inner}


def _matched_groups(saved: list[State], optimizer: Any) -> Iterator[State]:
    """For each group of `optimizer`, the saved one of equal settings, expert or not."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    def settings(group: State) -> tuple:
        return tuple(
            group.get(key, group.get(f"pre_{key}"))
            for key in param_group_identifier_keys
            if key != "is_expert_parallel"
        )

    groups = [group for state in saved for group in _inner(state)["param_groups"]]
    for current in optimizer.optimizer.state_dict()["param_groups"]:
        expert = current.get("is_expert_parallel")
        alike = [group for group in groups if settings(group) == settings(current)]
        alike.sort(key=lambda group: group.get("is_expert_parallel") != expert)
        if not alike:
            raise ValueError(
                f"the checkpoint has no parameter group with the settings {settings(current)} of "
                f"{param_group_identifier_keys}: load it with the learning rate and weight decay "
                "flags it was saved with, or pass --no-load-optim"
            )
        yield {**alike[0], "is_expert_parallel": expert, "params": current["params"]}
