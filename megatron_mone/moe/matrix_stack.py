"""Experts' stacked weights under optimizers that work on matrices: Muon, SOAP, Lion.

Stock experts hold a matrix a linear and expert. Here a parameter holds those of all local experts,
and Megatron gives whatever has not two dimensions to Adam (emerging_optimizers.py:
_is_nonlinear_or_embedding). A parameter that declares its matrices is told apart as they would be,
and the optimizer steps it matrix by matrix, each as stock's lies in memory: same bits.
Optimizer state has the parameter's shape where it has a matrix's, so checkpoints know no stack.
May touch: Megatron's registry of emerging optimizers, and which attributes of a parameter its fp32
copies carry.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_mone.common.patch import Patch, in_source, install, wrap

ATTRIBUTE = "stacked_matrices"
Group = dict[str, Any]


def declare(parameter: Parameter, matrices: Callable[[Tensor], list[Tensor]]) -> None:
    """Have Megatron's optimizers treat `parameter` as the matrices it is a stack of.

    Args:
        parameter: with the tensor-parallel attributes that each matrix has.
        matrices: of a tensor of the parameter's shape; views, one an expert, of equal shape.
            Importable by name, for a parameter with its attributes may be pickled.
    """
    install(PATCHES)
    setattr(parameter, ATTRIBUTE, matrices)


class StepsByMatrix:
    """Goes in front of an emerging optimizer's class; see the head of this file.

    A matrix is stepped alone, as the only parameter of its group, so that copies (of those that lie
    transposed) are of one matrix at a time. These optimizers keep all state by parameter.
    """

    param_groups: list[Group]
    state: Any

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of all parameters."""
        step = super().step  # type: ignore[misc]
        groups = self.param_groups
        try:
            self.param_groups = [_plain(group) for group in groups]
            step(closure)
            for group in groups:
                for stack in _stacks(group):
                    if stack.grad is not None:
                        self._each_matrix(group, stack, step)
        finally:
            self.param_groups = groups

    @torch.no_grad()
    def _init_group(self, group: Group, skip_non_grad_params: bool = True) -> None:
        init = super()._init_group  # type: ignore[misc]
        init(_plain(group), skip_non_grad_params)
        groups = self.param_groups
        try:
            for stack in _stacks(group):
                if stack.grad is not None or not skip_non_grad_params:
                    self._each_matrix(
                        group, stack, lambda: init(self.param_groups[0], skip_non_grad_params)
                    )
        finally:
            self.param_groups = groups

    def _each_matrix(self, group: Group, stack: Tensor, run: Callable[[], object]) -> None:
        """Call `run` with each matrix of `stack` as the only parameter of the only group."""
        split = getattr(stack, ATTRIBUTE)
        state = self.state[stack]
        before = dict(state)  # empty in a first step, to which every matrix comes without state
        values, gradients = split(stack.detach()), None if stack.grad is None else split(stack.grad)
        attributes = {k: v for k, v in vars(stack).items() if k != ATTRIBUTE}
        for e, value in enumerate(values):
            matrix = Parameter(value.contiguous(), requires_grad=False)
            vars(matrix).update(attributes)
            matrix.grad = None if gradients is None else gradients[e].contiguous()
            given = {key: _part(held, stack, e) for key, held in before.items()}
            self.state[matrix] = dict(given)
            self.param_groups = [{**group, "params": [matrix]}]
            run()
            if not value.is_contiguous():
                value.copy_(matrix)
            for key, held in self.state.pop(matrix).items():
                if not _is_stacked(held):
                    state[key] = held
                    continue
                if key not in state:
                    state[key] = _room(held, stack, len(values))
                slot = _slot(state[key], stack, e)
                if held is not given.get(key) or not slot.is_contiguous():
                    slot.copy_(held)


def _stacks(group: Group) -> list[Tensor]:
    return [p for p in group["params"] if getattr(p, ATTRIBUTE, None)]


def _plain(group: Group) -> Group:
    params = [p for p in group["params"] if not getattr(p, ATTRIBUTE, None)]
    return {**group, "params": params}


def _is_stacked(held: Any) -> bool:
    """Whether a piece of optimizer state is a matrix's own; numbers (`step`) are one for all."""
    return isinstance(held, Tensor) and held.dim() > 0


def _slot(held: Tensor, stack: Tensor, e: int) -> Tensor:
    """A matrix's part of its stack's state: of a matrix's shape, or another in the e-th row."""
    return getattr(stack, ATTRIBUTE)(held)[e] if held.shape == stack.shape else held[e]


def _part(held: Any, stack: Tensor, e: int) -> Any:
    """What a matrix starts its step from; it may change it in place."""
    if _is_stacked(held):
        slot = _slot(held, stack, e)
        return slot.contiguous() if held.shape == stack.shape else slot
    return held.clone() if isinstance(held, Tensor) else held


def _room(held: Tensor, stack: Tensor, matrices: int) -> Tensor:
    """For all that is like `held`, which one matrix has."""
    shape = getattr(stack, ATTRIBUTE)(stack)[0].shape
    if held.shape == shape:
        return torch.empty_like(stack, dtype=held.dtype, requires_grad=False)
    # As it lies: a product of SOAP's bases, columns first out of a QR, has bits of that order.
    order = torch.empty_like(held).stride()
    return held.new_empty_strided((matrices, *held.shape), (held.numel(), *order))


def _or_a_stack(is_managed: Callable[[Parameter], bool]) -> Callable[[Parameter], bool]:
    return lambda parameter: bool(getattr(parameter, ATTRIBUTE, None)) or is_managed(parameter)


def _apply() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import emerging_optimizers, layer_wise_optimizer
    from megatron.core.tensor_parallel import layers

    layers._MODEL_PARALLEL_ATTRIBUTE_DEFAULTS[ATTRIBUTE] = None  # copied to fp32 main parameters

    for module in (layer_wise_optimizer, optimizer):
        wrap(module, "is_managed_by_layer_wise_optimizer", _or_a_stack)
    for entry in emerging_optimizers._EMERGING_OPTIMIZERS.values():
        stock = entry.optimizer_cls
        entry.optimizer_cls = type(stock.__name__, (StepsByMatrix, stock), {})
        entry.default_param_overrides = {
            _but_stacks(key): override for key, override in entry.default_param_overrides.items()
        }


def _but_stacks(key: Any) -> Any:
    """A Megatron ParamKey that no declared stack matches."""
    predicate = key.predicate

    def matches(parameter: Parameter) -> bool:
        return not getattr(parameter, ATTRIBUTE, None) and predicate.fn(parameter)

    return replace(key, predicate=replace(predicate, fn=matches))


PATCHES = (
    Patch(
        name="stacked-matrices",
        needed_by="megatron/core/optimizer/emerging_optimizers.py: _is_nonlinear_or_embedding",
        why="it takes whatever has not two dimensions for Adam, and so all stacked weights",
        apply=_apply,
        still_needed=in_source("core/optimizer/emerging_optimizers.py", "len(param.shape) != 2"),
    ),
)
