"""A `transformer_engine` for this process, made of stand-ins: what Megatron imports of the package.

With it Megatron builds the layers that it builds on a GPU, by its own code. Only names that a
training job of a GPT reaches are there; where others are missing Megatron goes on without them, as
beside an older Transformer Engine. May touch: sys.modules.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from megatron_mone.planning.tracing.stand_ins import fp8 as fused_precision
from megatron_mone.planning.tracing.stand_ins import layers as fused_layers
from megatron_mone.planning.tracing.stand_ins import permutation, router
from megatron_mone.planning.tracing.stand_ins import quantized_weight as fused_weight
from megatron_mone.planning.tracing.stand_ins.attention import DotProductAttention
from megatron_mone.planning.tracing.stand_ins.layernorm import LayerNorm, RMSNorm
from megatron_mone.planning.tracing.stand_ins.linear import LayerNormLinear, Linear, get_dummy_wgrad
from megatron_mone.planning.tracing.stand_ins.optimizers import (
    FusedAdam,
    FusedSGD,
    multi_tensor_applier,
    multi_tensor_l2norm,
    multi_tensor_scale,
)

VERSION = "2.14.0"
"""Megatron asks for a least version; of this one the sources of the stand-ins were read."""


class CudaRNGStatesTracker:
    """Base of Megatron's wrapper of Transformer Engine's random states."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget all states."""
        self.states = {}

    def add(self, name: str, seed: int) -> None:
        """Name a state."""
        self.states[name] = seed

    def get_states(self) -> dict[str, Any]:
        """All of them."""
        return dict(self.states)

    def set_states(self, states: dict[str, Any]) -> None:
        """Replace all."""
        self.states = dict(states)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from a state; nothing here draws.

        Args:
            name: of the state.
        """
        assert name in self.states, name
        yield


class GroupedLinear(torch.nn.Module):
    """Base of Megatron's grouped linear layers, whose experts have a stand-in as a whole.

    Raises:
        RuntimeError: always.
    """

    def __init__(self, *_args: Any, **_names: Any) -> None:
        raise RuntimeError("grouped linear layers are traced as whole experts (values.py)")


def checkpoint(
    function: Callable[..., Any], *args: Any, distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None, tp_group: Any = None, **names: Any,
) -> Any:  # fmt: skip
    """transformer_engine.pytorch.distributed.checkpoint: Megatron's, in the fp8 context of now.

    Args:
        function: of `args` and `names`, run again in the backward pass.
        distribute_saved_activations: keep each rank's part of the first argument.
        get_rng_state_tracker, tp_group: of no use to tensors without values.
    """
    from megatron.core.tensor_parallel.random import CheckpointFunction

    del get_rng_state_tracker, tp_group
    recipe = fused_precision.FP8GlobalStateManager.get_fp8_recipe()

    def run(*given: Any) -> Any:
        with fused_precision.fp8_autocast(recipe is not None, recipe):
            return function(*given, **names)

    return CheckpointFunction.apply(run, distribute_saved_activations, *args)


@contextmanager
def activation_recompute_forward(**_phase: Any) -> Iterator[None]:
    """Around both forward passes of what is recomputed; what it keeps for fp8 is no tensor."""
    yield


_FP8 = {
    "FP8GlobalStateManager": fused_precision.FP8GlobalStateManager,
    "fp8_autocast": fused_precision.fp8_autocast,
    "fp8_model_init": fused_precision.fp8_model_init,
}
_MODULES: dict[str, dict[str, Any]] = {
    "": {"__version__": VERSION},
    "common": {},
    "common.recipe": {
        name: getattr(fused_precision, name)
        for name in (
            "Format",
            "DelayedScaling",
            "Float8CurrentScaling",
            "Float8BlockScaling",
            "MXFP8BlockScaling",
            "NVFP4BlockScaling",
        )
    },
    "pytorch": {
        "Linear": Linear,
        "LayerNormLinear": LayerNormLinear,
        "GroupedLinear": GroupedLinear,
        "RMSNorm": RMSNorm,
        "LayerNorm": LayerNorm,
        "DotProductAttention": DotProductAttention,
        **_FP8,
    },
    "pytorch.fp8": _FP8,
    "pytorch.tensor": {"QuantizedTensor": fused_weight.QuantizedTensor},
    "pytorch.tensor.mxfp8_tensor": {"MXFP8Tensor": fused_weight.MXFP8Tensor},
    "pytorch.tensor.utils": {
        name: getattr(fused_weight, name)
        for name in ("replace_raw_data", "cast_master_weights_to_fp8", "post_all_gather_processing")
    },
    "pytorch.attention": {},
    "pytorch.attention.rope": {"apply_rotary_pos_emb": fused_layers.apply_rotary_pos_emb},
    "pytorch.distributed": {
        "CudaRNGStatesTracker": CudaRNGStatesTracker,
        "checkpoint": checkpoint,
        "activation_recompute_forward": activation_recompute_forward,
    },
    "pytorch.module": {},
    "pytorch.module.base": {
        "get_dummy_wgrad": get_dummy_wgrad,
        "initialize_ub": lambda **_settings: None,
        "UserBufferQuantizationMode": type("Modes", (), {"FP8": "fp8", "NONE": "none"}),
    },
    "pytorch.optimizers": {
        "FusedAdam": FusedAdam,
        "FusedSGD": FusedSGD,
        "multi_tensor_applier": multi_tensor_applier,
        "multi_tensor_l2norm": multi_tensor_l2norm,
        "multi_tensor_scale": multi_tensor_scale,
        "multi_tensor_scale_tensor": None,  # its norm would be a tensor, which has no value here
    },
    "pytorch.permutation": {
        "moe_permute": permutation.permute,
        "moe_permute_with_probs": permutation.permute_with_probs,
        "moe_permute_and_pad_with_probs": permutation.permute_and_pad_with_probs,
        "moe_unpermute": permutation.unpermute,
        "moe_sort_chunks_by_index": permutation.sort_chunks,
        "moe_sort_chunks_by_index_with_probs": permutation.sort_chunks_with_probs,
    },
    "pytorch.router": {
        "fused_topk_with_score_function": router.router,
        "fused_compute_score_for_moe_aux_loss": router.router_scores,
        "fused_moe_aux_loss": router.router_aux_loss,
    },
    "pytorch.cpp_extensions": {"general_gemm": router.router_product},
}


def install() -> None:
    """Put the package, and the name of Apex's weight gradient kernels, where imports find them.

    Raises:
        RuntimeError: Megatron was imported without it.
    """
    extension = sys.modules.get("megatron.core.extensions.transformer_engine")
    if extension is not None and getattr(extension.te, "stands_in", None) is not True:
        raise RuntimeError("Megatron was imported before the stand-in of Transformer Engine")
    if extension is not None:
        return
    for name, values in _MODULES.items():
        _module(f"transformer_engine.{name}".rstrip("."), values)
    sys.modules["transformer_engine"].stands_in = True  # type: ignore[attr-defined]
    _module("fused_weight_gradient_mlp_cuda", {})  # Megatron asks whether it is there


def _module(name: str, values: dict[str, Any]) -> None:
    """A module in sys.modules, and in its package."""
    module = ModuleType(name, "Stand-in; see megatron_mone/planning/tracing/stand_ins/package.py.")
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(values)
    sys.modules[name] = module
    package, _, last = name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)
