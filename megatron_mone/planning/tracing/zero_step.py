"""A step that DeepSpeed's engine makes, recorded from its last micro-batch on.

Megatron's gradients have their buffers from step to step; DeepSpeed's come to be in a step's first
backward pass and end with the step. So two micro-batches run, and only the second is recorded, with
the step after it: gradients are there to be added to, and what is sent is either of every
micro-batch, as it is launched within a pass, or of the step. May touch: Megatron's schedules, while
it lasts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.planning.tracing.recorder import Recorder, held_bytes
from megatron_mone.profiling.ledger import GRADIENTS

MICRO_BATCHES = 2


@contextmanager
def last_micro_batch(
    recorder: Recorder, held: Callable[[], Mapping[str, list[Tensor]]]
) -> Iterator[Mapping[str, Mapping[int, int]]]:
    """While it lasts a step of MICRO_BATCHES is made, whose last one starts the recorder's clock.

    Args:
        recorder: not started.
        held: asked then what is kept from micro-batch to micro-batch, by kind.

    Yields:
        `held_bytes` of what `held` answered, once it was asked.
    """
    from megatron.core.pipeline_parallel import schedules

    found: dict[str, dict[int, int]] = {}
    forwards = 0

    def within(run: Callable[..., Any]) -> Callable[..., Any]:
        def passed(*given: Any, **named: Any) -> Any:
            recorder.in_pass = True
            try:
                return run(*given, **named)
            finally:
                recorder.in_pass = False

        return passed

    def forward_step(*given: Any, **named: Any) -> Any:
        nonlocal forwards
        forwards += 1
        if forwards == MICRO_BATCHES:
            now = held()
            found.update(held_bytes(now))
            recorder.live.begin_with(now[GRADIENTS])
            recorder.clock.begin()
        return forward(*given, **named)

    recorder.in_pass = False
    forward = within(schedules.forward_step)
    with ExitStack() as stack:
        stack.enter_context(Replaced(schedules, "forward_step", forward_step))
        backward = within(schedules.backward_step)
        stack.enter_context(Replaced(schedules, "backward_step", backward))
        yield found
