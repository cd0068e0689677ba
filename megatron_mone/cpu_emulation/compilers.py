"""Compilers and compiled extensions that a CPU rank goes without."""

import functools
import importlib.util
import os

from megatron_mone.common.patch import Patch, in_source, megatron_source, rebind, wrapping


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
        still_needed=in_source("core/jit.py", "jit_fuser = torch.compile"),
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
    wrapping(
        "no-warm-up",
        "megatron.training.initialize: _warmup_jit_function",
        lambda stock: lambda tp_size=None: None,
        why="runs fused functions until they are compiled, and draws random tensors for it whose "
        "sizes depend on the layout; a router's weights, which are drawn from the CPU's generator "
        "even on a GPU, would then depend on the layout",
        needed_while="def _warmup_jit_function",
    ),
    wrapping(
        "softmax-kernel",
        "megatron.core.fusions.fused_softmax: FusedScaleMaskSoftmax.is_kernel_available",
        lambda stock: lambda self, mask, b, np, sq, sk: False,
        why="in 16 bits it answers from shapes alone, then imports a CUDA extension",
        needed_while="import scaled_masked_softmax_cuda",
    ),
)
