"""Weights and optimizer state of DeepSpeed's engine, parameter by parameter and whole.

Each ZeRO stage keeps them cut in its own way; here a parameter's float32 weight and moments are
tensors of its shape, as Megatron's optimizers have them. Collective: all ranks ask for the same
parameters in the same order. May touch: the engine's optimizer state.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Held = Sequence[tuple[Parameter, Tensor]]
_STEP = "step"
_GATHERED, _STALE = "mone_gathered", "mone_stale"  # attributes of the engine


@contextlib.contextmanager
def whole_parameters(engine: Any) -> Iterator[None]:
    """While it lasts the model's parameters are whole on every rank, and what is written to them is
    kept: ZeRO 3 has a rank hold its part alone. May be entered again inside."""
    if engine.zero_optimization_stage() < 3 or getattr(engine, _GATHERED, False):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        setattr(engine, _GATHERED, True)
        try:
            yield
        finally:
            setattr(engine, _GATHERED, False)
    if getattr(engine, _STALE, False):
        take_weights(engine)


def take_weights(engine: Any) -> None:
    """Make the float32 weights those of the model; where these are whole, once they are cut."""
    setattr(engine, _STALE, getattr(engine, _GATHERED, False))
    if not getattr(engine, _STALE) and hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()


def part_steps(engine: Any) -> None:
    """Give each tensor that is stepped a count of its own: DeepSpeed hands all of ZeRO 3 the one
    tensor that it found in a universal checkpoint, which then counts every one of them."""
    for one in _flat(engine):
        found = engine.basic_optimizer.state.get(one, {})
        if torch.is_tensor(found.get(_STEP)):
            found[_STEP] = found[_STEP].clone()


def gather(engine: Any, held: Held, parts: Sequence[Any]) -> None:
    """Fill Megatron's optimizer with the engine's state.

    Args:
        engine: DeepSpeed's.
        held: the model's parameters, each with the tensor that Megatron's optimizer steps.
        parts: Megatron's optimizers, of those tensors.
    """
    states = _by_tensor(parts)
    names = _moments(engine)
    if names:
        _link(engine)
    step = _steps(engine)
    for own, main in held:
        if main is not own:
            main.data.copy_(_full(engine, own))
        if names:
            states[id(main)][main] = {name: _full(engine, own, name) for name in names}
            if step is not None:
                states[id(main)][main][_STEP] = step.clone()


def deal(engine: Any, held: Held, parts: Sequence[Any]) -> None:
    """The other way: the engine's state from Megatron's optimizer, and the weights too."""
    states = _by_tensor(parts)
    steps = [of[main].get(_STEP) for _, main in held for of in [states[id(main)]] if main in of]
    names = sorted({name for _, main in held for name in states[id(main)].get(main, {})} - {_STEP})
    _make_moments(engine, names, steps[0] if steps else None)
    for own, main in held:
        _set(engine, own, main.detach())
        for name in names:
            _set(engine, own, states[id(main)][main][name], name)
    take_model_weights(engine)


def take_model_weights(engine: Any) -> None:
    """Make the model's weights those in float32 (bf16: rounded)."""
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def _by_tensor(parts: Sequence[Any]) -> dict[int, Any]:
    """id of each tensor that an optimizer steps -> the optimizer's state."""
    return {
        id(one): part.optimizer.state
        for part in parts for group in part.optimizer.param_groups for one in group["params"]
    }  # fmt: skip


def _flat(engine: Any) -> Iterable[Tensor]:
    """What the optimizer steps; of ZeRO 3 its groups hold them only while they are stepped."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        yield from engine.optimizer.fp32_partitioned_groups_flat
        return
    for group in engine.basic_optimizer.param_groups:
        yield from group["params"]


def _moments(engine: Any) -> list[str]:
    """Names of the tensors that the optimizer has for a parameter; none before the first step."""
    states = engine.basic_optimizer.state
    return sorted({
        name for one in _flat(engine) for name, value in states.get(one, {}).items()
        if torch.is_tensor(value) and value.shape == one.shape
    })  # fmt: skip


def _steps(engine: Any) -> Tensor | None:
    """The number of steps, where the optimizer counts them by parameter."""
    for one in _flat(engine):
        if (found := engine.basic_optimizer.state.get(one, {}).get(_STEP)) is not None:
            return torch.as_tensor(found)
    return None


def _make_moments(engine: Any, names: Iterable[str], step: Any) -> None:
    """Zeros where the optimizer has no state yet."""
    states = engine.basic_optimizer.state
    for one in _flat(engine):
        for name in names:
            states[one].setdefault(name, torch.zeros_like(one))
        if step is not None:
            states[one][_STEP] = torch.as_tensor(step).clone()
    _link(engine)


def _link(engine: Any) -> None:
    """Have DeepSpeed find each parameter's part of the moments: of ZeRO 1 and 2 it links all groups
    when the first is stepped, when the others, experts' too, have none yet."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _full(engine: Any, parameter: Parameter, name: str | None = None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if name is None else engine.basic_optimizer.state[parameter][name]
    if name is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, name)


def _set(engine: Any, parameter: Parameter, value: Tensor, name: str | None = None) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        into = parameter.data if name is None else engine.basic_optimizer.state[parameter][name]
        into.copy_(value)
    elif name is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, name)
