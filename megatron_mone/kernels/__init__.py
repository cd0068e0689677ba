"""The masked grouped expert MLP and its backends."""

from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.grouped_mlp import (
    GroupedMLPOutput,
    grouped_mlp_with_gates,
    mone_grouped_mlp,
    resolve_backend,
)

__all__ = [
    "Choose",
    "GroupedMLPOutput",
    "Selection",
    "grouped_mlp_with_gates",
    "mone_grouped_mlp",
    "resolve_backend",
]
