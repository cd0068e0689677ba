"""Stand-ins by which a traced program has a host beside its device: memory there, and its Adam.

May touch: torch.empty and Tensor.pin_memory, Megatron's HybridDeviceOptimizer and the optimizer
that it has on the host, while `installed`.

Sources: megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py, torch/optim/adamw.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.planning.tracing.recorder import Recorder
from megatron_mone.planning.tracing.stand_ins.op import note_flat


class HostAdam(torch.optim.Optimizer):
    """torch.optim.AdamW(fused=True) on the host: one op a step, "host.adam".

    Args:
        params: parameters or groups, the host's.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """One update; a first step makes the moments, of the parameters' type."""
        assert closure is None
        elements = size = 0
        for parameter in _parameters(self):
            state = self.state[parameter]
            if not state:
                state.update(
                    exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                )
            elements, size = elements + parameter.numel(), size + parameter.nbytes
        if elements:
            # Parameter, gradient and two moments are read; all but the gradient written.
            note_flat("host.adam", elements, 4 * size, 3 * size, torch.float32)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


@contextmanager
def installed(recorder: Recorder) -> Iterator[None]:
    """While it lasts programs on tensors without values have a host.

    Args:
        recorder: whose host is told of its tensors; and of what activation offloading keeps.
    """
    host = recorder.host
    from megatron.core import optimizer
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import OffloadTensorGroup

    empty = torch.empty
    split = HybridDeviceOptimizer._get_sub_optimizer_param_groups
    push = OffloadTensorGroup.push_tensor

    def made(*size: Any, **how: Any) -> Tensor:
        tensor = empty(*size, **how)
        pinned = bool(how.get("pin_memory"))
        on_host = pinned or how.get("device") == "cpu"
        return host.add(tensor, pinned=pinned) if on_host else tensor

    def pinned(tensor: Tensor, device: Any = None) -> Tensor:
        return host.add(tensor, pinned=True) if tensor.is_meta else tensor

    def split_by_device(self: Any, fraction: float) -> Any:
        on_device = property(lambda tensor: tensor.is_meta and not host.holds(tensor))
        with Replaced(Tensor, "is_cuda", on_device):
            return split(self, fraction)

    def pushed(self: Any, tag: Any, state: Any) -> None:
        """A tensor is handed over, or what is held in its place: (device, copy on the host, ..)."""
        recorder.handed_over((id(self), tag), state if isinstance(state, Tensor) else None)
        push(self, tag, state)

    with ExitStack() as stack:
        stack.enter_context(Replaced(torch, "empty", made))
        stack.enter_context(Replaced(OffloadTensorGroup, "push_tensor", pushed))
        stack.enter_context(Replaced(Tensor, "pin_memory", pinned))
        stack.enter_context(
            Replaced(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", split_by_device)
        )
        stack.enter_context(Replaced(optimizer, "CPUAdam", HostAdam))
        yield
