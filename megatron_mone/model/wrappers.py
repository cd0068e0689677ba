"""A model chunk without what Megatron wraps it in. Touches nothing."""

from typing import Any


def unwrapped(chunk: Any) -> Any:
    """The model inside; Megatron's own unwrap_model stops at Megatron FSDP's inner wrapper.

    Args:
        chunk: of the model, wrapped or not.
    """
    from megatron.core.utils import unwrap_model

    model = unwrap_model(chunk)
    while hasattr(model, "param_and_grad_buffer"):
        model = unwrap_model(model.module)
    return model
