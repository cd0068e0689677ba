"""A step that cuts weights or gradients over replicas, recorded from its last micro-batch on.

Megatron's gradients have their buffers from step to step; DeepSpeed's come to be in a step's first
backward pass and end with the step. So two micro-batches run, and only the second is recorded, with
the step after it: gradients are there to be added to, and what is sent is either of every
micro-batch, as it is launched within a pass, or of the step.
Megatron FSDP gathers some weights in a step's first micro-batch alone, and reduces some gradients
in its last alone, so that of the first micro-batch what it sends is noted too (`sent_by_any`).
May touch: Megatron's schedules, while it lasts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.planning.tracing.recorder import Recorder, held_bytes
from megatron_mone.planning.tracing.trace import Collective
from megatron_mone.profiling.ledger import GRADIENTS, WEIGHTS

MICRO_BATCHES = 2


@contextmanager
def last_micro_batch(
    recorder: Recorder,
    held: Callable[[], Mapping[str, list[Tensor]]],
    earlier: list[Collective] | None = None,
) -> Iterator[Mapping[str, Mapping[int, int]]]:
    """While it lasts a step of MICRO_BATCHES is made, whose last one is recorded.

    Args:
        recorder: not started.
        held: asked then what is kept from micro-batch to micro-batch, by kind.
        earlier: takes what the others send; None: they are not watched.

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
            recorder.earlier = None
            if earlier is None:
                recorder.live.begin_with(now[GRADIENTS])
                recorder.clock.begin()
            else:  # whose buckets of weights fill within a pass
                recorder.gathered = {one.untyped_storage()._cdata for one in now[WEIGHTS]}
                recorder.live.begin_with(now[GRADIENTS] + now[WEIGHTS])
        return forward(*given, **named)

    recorder.in_pass, recorder.earlier = False, earlier
    if earlier is not None:
        recorder.clock.begin()
    forward = within(schedules.forward_step)
    with ExitStack() as stack:
        stack.enter_context(Replaced(schedules, "forward_step", forward_step))
        backward = within(schedules.backward_step)
        stack.enter_context(Replaced(schedules, "backward_step", backward))
        yield found


def sent_by_any(earlier: Sequence[Collective], last: Sequence[Collective]) -> list[Collective]:
    """What every micro-batch sends, however many there are, and what a step sends once.

    Args:
        earlier: of a step's first micro-batch.
        last: of its second, the last, and of what follows.

    Returns:
        Those `in_pass` of a micro-batch between a first and a last, gathers as in the last and
        reductions as in the first; the others are what the two and the step have beyond that.
    """
    steady = [one for one in last if one.in_pass and not _reduces(one)]
    steady += [one for one in earlier if one.in_pass and _reduces(one)]
    # A gather may be launched ahead, at the end of the step before: where is no matter here.
    rest = Counter(replace(one, in_pass=True) for one in (*earlier, *last))
    rest.subtract(steady * MICRO_BATCHES)
    missing = [one for one, count in rest.items() if count < 0]
    if missing:
        raise RuntimeError(f"{missing[0]} is not of each of {MICRO_BATCHES} micro-batches")
    return steady + [replace(one, in_pass=False) for one in rest.elements()]


def _reduces(one: Collective) -> bool:
    return one.kind in ("reduce_scatter", "all_reduce")
