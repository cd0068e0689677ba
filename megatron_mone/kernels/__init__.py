"""The masked grouped expert MLP and its backends."""

from megatron_mone.kernels.grouped_mlp import (
    GroupedMLPOutput,
    mone_grouped_mlp,
    resolve_backend,
)

__all__ = ["GroupedMLPOutput", "mone_grouped_mlp", "resolve_backend"]
