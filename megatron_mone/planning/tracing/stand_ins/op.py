"""What a stand-in for a fused kernel shares with the others: how it is taken down, as one op.

A stand-in makes its outputs without values, so that no operator inside it is seen, and says what
the kernel on a GPU would read, write and multiply. May touch: the Recorder that listens, which is
of this process; nothing is taken down while none does.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_mone.kernels.triton import launch
from megatron_mone.planning.tracing.recorder import Recorder
from megatron_mone.planning.tracing.trace import Op

META = torch.device("meta")
Outputs = Sequence[tuple[Sequence[int], torch.dtype]]

_recorder: Recorder | None = None


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """While it lasts stand-ins of this process tell `recorder` what they stand for, and kernels of
    the Triton backend what they would run."""
    global _recorder
    _recorder, before = recorder, _recorder
    try:
        with launch.recording(_note_launch):
            yield
    finally:
        _recorder = before


def _note_launch(one: launch.Launch) -> None:
    # The op's type is that of the factors: sums come out in 16 or 32 bits.
    name = "mone." + one.kernel.split(".")[1]
    note(name, one.reads, one.writes, flops=one.flops, dtype=one.reads[0].dtype)


def note(
    name: str,
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    *,
    flops: int = 0,
    dtype: torch.dtype | None = None,
    read: int | None = None,
    phase: str | None = None,
) -> None:
    """Take down one kernel in the phase and pass under way.

    Args:
        name: "fused.linear", ...
        inputs, outputs: its tensors; a place that is added to stands in both.
        flops: of its products.
        dtype: in which it multiplies; of the first output when None.
        read: bytes; of all inputs when None.
        phase: another one than that under way.
    """
    if _recorder is not None:
        _recorder.note(name, inputs, outputs, flops, dtype=dtype, read=read, phase=phase)


def note_flat(name: str, elements: int, read: int, written: int, dtype: torch.dtype) -> None:
    """Take down a kernel over many tensors, one element like another.

    Args:
        name: "fused.adam", ...
        elements: of one of its lists.
        read, written: bytes of all.
        dtype: in which it computes.
    """
    if _recorder is None or not _recorder.clock.running:
        return
    shape = ((elements,),)
    kind = str(dtype).removeprefix("torch.")
    clock = _recorder.clock
    _recorder.ops.append(Op(name, shape, shape, kind, read, written, 0, clock.phase, clock.pass_))


def unknown(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without values."""
    return torch.empty(tuple(shape), dtype=dtype, device=META)


def run(name: str, inputs: Sequence[Tensor], outputs: Outputs, kept: Sequence[Tensor]) -> Any:
    """One op forward and one, NAME_backward, for the gradients of the inputs.

    Args:
        name: of the op.
        inputs: that it reads, beside `kept`.
        outputs: (shape, dtype) of what it makes.
        kept: for the backward pass.
    """
    return _Kernel.apply(name, outputs, kept, *inputs)


class _Kernel(torch.autograd.Function):
    """One op forward and one backward, with the outputs and the kept tensors that it is told."""

    @staticmethod
    def forward(ctx: Any, name: str, outputs: Outputs, kept: Sequence[Tensor], *inputs: Tensor):
        made = tuple(unknown(shape, dtype) for shape, dtype in outputs)
        note(name, [*inputs, *kept], made)
        ctx.save_for_backward(*kept)
        ctx.name, ctx.like = name, [(tensor.shape, tensor.dtype) for tensor in inputs]
        ctx.mark_non_differentiable(*(m for m in made if not m.dtype.is_floating_point))
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        wanted = [
            unknown(*like) if need else None
            for like, need in zip(ctx.like, ctx.needs_input_grad[3:], strict=True)
        ]
        read = [g for g in gradients if g is not None]
        made = [tensor for tensor in wanted if tensor is not None]
        note(f"{ctx.name}_backward", [*read, *ctx.saved_tensors], made)
        return None, None, None, *wanted
