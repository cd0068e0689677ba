"""Stand-ins for Transformer Engine's Adam and its functions over lists of tensors, without values.

"fused.adam" is one op a step: it reads gradients, parameters and moments, and writes what changes.
The moments have the dtypes asked for (8-bit ones a scale each), and master weights are this
optimizer's where Megatron asks for that: whole, or of bf16 parameters the lower half of fp32.
"fused.l2_norm" and "fused.scale" are one op a call. May touch: the optimizer's state.

Sources: transformer_engine/pytorch/optimizers/fused_adam.py, multi_tensor_apply.py.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_mone.planning.tracing.stand_ins.op import note_flat

MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """transformer_engine.pytorch.optimizers.FusedAdam.

    Args:
        params: parameters or groups.
        lr: learning rate.
        master_weights: hold fp32 (or `master_weight_dtype`) copies of 16-bit parameters.
        use_decoupled_grad: read gradients from `decoupled_grad`.
        exp_avg_dtype, exp_avg_sq_dtype: of the moments.
        store_param_remainders: of fp32 copies of bf16 parameters hold the lower half alone.
        settings: names that change no shape.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, master_weights: bool = False,
        use_decoupled_grad: bool = False, master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32, exp_avg_sq_dtype: torch.dtype = torch.float32,
        store_param_remainders: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": settings.get("weight_decay", 0.0)})
        self._dtypes = dict(zip(MOMENTS, (exp_avg_dtype, exp_avg_sq_dtype), strict=True))
        self._master = master_weight_dtype if master_weights else None
        self._remainders = store_param_remainders
        self._decoupled = use_decoupled_grad

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """One update; a first step makes the state."""
        assert closure is None
        elements = read = written = 0
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                gradient = parameter.decoupled_grad if self._decoupled else parameter.grad
                if gradient is None:
                    continue
                state = self._state_of(parameter).values()
                # HybridDeviceOptimizer notes the parameter itself in its state.
                changed = [parameter, *(tensor for tensor in state if tensor is not parameter)]
                size = sum(tensor.nbytes for tensor in changed)
                elements += parameter.numel()
                read, written = read + size + gradient.nbytes, written + size
        if elements:
            note_flat("fused.adam", elements, read, written, torch.float32)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            for name, dtype in self._dtypes.items():
                state[name] = torch.empty_like(parameter, dtype=dtype)
                if dtype == torch.uint8:
                    state[f"{name}_scale"] = parameter.new_empty(1, dtype=torch.float32)
            if self._master is not None and parameter.dtype != self._master:
                halves = self._remainders and parameter.dtype == torch.bfloat16
                dtype = torch.int16 if halves else self._master
                state["master_param"] = torch.empty_like(parameter, dtype=dtype)
        return state


class FusedSGD(torch.optim.SGD):
    """transformer_engine.pytorch.optimizers.FusedSGD: torch's, whose operators move as much."""


def multi_tensor_applier(
    operation: Callable[..., Any], flag: Tensor, lists: list[list[Tensor]], *args: Any
) -> Any:
    """Call `operation` on lists of tensors."""
    return operation(2048 * 32, flag, lists, *args)


def multi_tensor_l2norm(
    _chunk: int, _flag: Tensor, lists: list[list[Tensor]], *_per_tensor: Any
) -> tuple[Tensor, None]:
    """The norm of all tensors together, fp32 [1]."""
    note_flat("fused.l2_norm", *_elements(lists[0]), 4, torch.float32)
    return torch.empty(1, dtype=torch.float32, device="meta"), None


def multi_tensor_scale(_chunk: int, _flag: Tensor, lists: list[list[Tensor]], *_scale: Any) -> None:
    """Scale the first list's tensors into the second's."""
    written = sum(tensor.nbytes for tensor in lists[1])
    note_flat("fused.scale", *_elements(lists[0]), written, torch.float32)


def _elements(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """(elements, bytes) of a list."""
    sizes = [(tensor.numel(), tensor.nbytes) for tensor in tensors]
    return sum(size for size, _ in sizes), sum(size for _, size in sizes)
