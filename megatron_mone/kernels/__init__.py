"""The masked grouped expert MLP and its backends."""

from importlib import import_module

from megatron_mone.kernels.choice import BiasedRule, Choose, Selection
from megatron_mone.kernels.grouped_mlp import grouped_mlp_with_gates, mone_grouped_mlp
from megatron_mone.kernels.registry import (
    BACKENDS,
    Call,
    GroupedMLPOutput,
    choose_backend,
    resolve_backend,
)

__all__ = [
    "BACKENDS",
    "BiasedRule",
    "Call",
    "Choose",
    "GroupedMLPOutput",
    "Selection",
    "choose_backend",
    "grouped_mlp_with_gates",
    "mone_grouped_mlp",
    "resolve_backend",
]

for _backend in ("cpu.backend", "triton.backend", "te.backend", "sparse24", "reference"):
    import_module(f"{__name__}.{_backend}")  # registers itself
