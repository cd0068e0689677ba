"""Whether the Triton kernels can run here."""

import torch


def available() -> tuple[bool, str]:
    """Whether the kernels run here, and the reason when they do not.

    They run on a CUDA device, or on the CPU under TRITON_INTERPRET=1 (for checks: it is slow).
    """
    try:
        import triton
    except ImportError as error:
        return False, f"the triton package is missing ({error}): pip install triton"
    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        return True, ""
    return False, "triton needs a CUDA device, or TRITON_INTERPRET=1 set before the first import"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU; triton must be here."""
    import triton

    return bool(triton.knobs.runtime.interpret)
