"""Flags that put weight gradients off, which Megatron ties to Transformer Engine.

On CPU ranks Megatron's local linears make theirs with the input gradients, as their `backward_dw`,
which does nothing, expects; experts that put theirs off do.
"""

import functools
from collections.abc import Callable
from typing import Any

from megatron_mone.common.patch import wrapping


def hiding(flag: str, *unless: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A check of arguments or of a config that does not see `flag` where the layers are local and
    nothing is set that it refuses beside it, `unless`."""

    def wrapper(check: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(check)
        def wrapped(checked: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = getattr(checked, flag) and checked.transformer_impl == "local"
            if not hidden or any(getattr(checked, name) for name in unless):
                return check(checked, *args, **kwargs)
            setattr(checked, flag, False)
            try:
                return check(checked, *args, **kwargs)
            finally:
                setattr(checked, flag, True)

        return wrapped

    return wrapper


PATCHES = (
    wrapping(
        "delayed-weight-gradients",
        "megatron.training.arguments: validate_args",
        hiding("delay_wgrad_compute"),
        why="delay_wgrad_compute asserts transformer_impl = transformer_engine",
        needed_while="Delaying wgrad compute is only supported with transformer_engine",
    ),
    wrapping(
        "weight-gradients-beside-dispatch",
        "megatron.core.transformer.transformer_config: TransformerConfig.__post_init__",
        hiding(
            "overlap_dispatch_backward_with_experts_wgrad",
            "overlap_moe_expert_parallel_comm",
        ),
        why="overlap_dispatch_backward_with_experts_wgrad asserts a version of Transformer Engine",
        needed_while="TE version >= 2.3.0 is required for overlap_dispatch_backward",
    ),
)
