"""Megatron FSDP on parameters without values, whose peers are copies of this rank.

It refuses parameters without values when it lays them into its buffers, where it copies them, and
asks peers whether their pieces fill each parameter, which copies of one piece never do.
May touch: Megatron's FSDP, while `installed`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from megatron_mone.common.patch import Replaced


class _Allocated(Parameter):
    """A parameter that says it has memory."""

    is_meta = False


def _allocated(fill: Callable[..., Any]) -> Callable[..., Any]:
    def filled(self: Any, *args: Any) -> Any:
        kinds = {parameter: type(parameter) for parameter in self.params}
        for parameter in self.params:
            parameter.__class__ = _Allocated
        try:
            return fill(self, *args)
        finally:
            for parameter, kind in kinds.items():
                parameter.__class__ = kind

    return filled


def _no_fault(check: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """The work of a check for NaN, which of values that are not known finds one."""

    def checked(grad: Tensor) -> None:
        with suppress(ValueError):
            check(grad)

    return checked


@contextmanager
def installed() -> Iterator[None]:
    """While it lasts Megatron FSDP wraps models without values."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer as buffers

    name = "_init_each_parameter_group_buffers"
    buffer = buffers.ParamAndGradBuffer
    with ExitStack() as stack:
        stack.enter_context(Replaced(buffer, name, _allocated(getattr(buffer, name))))
        for check in ("validate_uneven_dtensor", "update_uneven_dtensor_chunk_metadata"):
            stack.enter_context(Replaced(buffers, check, lambda dtensor: None))
        faults = "_check_nan_in_grad"
        stack.enter_context(Replaced(buffers, faults, _no_fault(getattr(buffers, faults))))
        yield
