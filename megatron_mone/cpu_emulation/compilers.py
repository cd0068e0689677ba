"""Compilers and compiled extensions that a CPU rank goes without."""

from __future__ import annotations

import functools
import importlib.util
import os

from megatron_mone.common.patch import Patch, megatron_source, rebind


def _apply_no_dynamo() -> None:
    # For functions decorated from now on (Megatron's jit_fuser is torch.compile) ...
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch
    import torch._dynamo

    # ... and for those that an earlier import has decorated.
    torch._dynamo.config.disable = True
    torch.compiler.set_stance("force_eager")


def _apply_compile_helpers() -> None:
    from megatron.core.datasets import utils

    original = utils.compile_helpers

    @functools.wraps(original)
    def compile_helpers() -> None:
        # With a Makefile (a source checkout) Megatron's own way works on a CPU too.
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    utils.compile_helpers = compile_helpers
    rebind(original, compile_helpers)


def _apply_no_warm_up() -> None:
    from megatron.training import initialize

    initialize._warmup_jit_function = lambda tp_size=None: None


def _apply_softmax_kernel() -> None:
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax

    FusedScaleMaskSoftmax.is_kernel_available = lambda self, mask, b, np, sq, sk: False


def _helpers_have_no_makefile() -> bool:
    spec = importlib.util.find_spec("megatron")
    roots = (spec.submodule_search_locations or []) if spec else []
    return not any(os.path.exists(f"{root}/core/datasets/Makefile") for root in roots)  # noqa: PTH110


PATCHES = (
    Patch(
        name="no-dynamo",
        needed_by="megatron/core/jit.py: enable_jit_fuser (torch.compile)",
        why="compiling the fused element-wise functions for a CPU takes minutes and a C++ compiler",
        apply=_apply_no_dynamo,
        still_needed=lambda: "jit_fuser = torch.compile" in megatron_source("core/jit.py"),
    ),
    Patch(
        name="compile-helpers",
        needed_by="megatron/core/datasets/utils.py: compile_helpers",
        why="runs make in the wheel, which has the compiled helper and no Makefile",
        apply=_apply_compile_helpers,
        still_needed=lambda: (
            _helpers_have_no_makefile()
            and '["make", "-C"' in megatron_source("core/datasets/utils.py")
        ),
    ),
    Patch(
        name="no-warm-up",
        needed_by="megatron/training/initialize.py: _warmup_jit_function",
        why="runs fused functions until they are compiled, and draws random tensors for it whose "
        "sizes depend on the layout; a router's weights, which are drawn from the CPU's generator "
        "even on a GPU, would then depend on the layout",
        apply=_apply_no_warm_up,
        still_needed=lambda: (
            "def _warmup_jit_function" in megatron_source("training/initialize.py")
        ),
    ),
    Patch(
        name="softmax-kernel",
        needed_by="megatron/core/fusions/fused_softmax.py: is_kernel_available",
        why="in 16 bits it answers from shapes alone, then imports a CUDA extension",
        apply=_apply_softmax_kernel,
        still_needed=lambda: (
            "import scaled_masked_softmax_cuda" in megatron_source("core/fusions/fused_softmax.py")
        ),
    ),
)
