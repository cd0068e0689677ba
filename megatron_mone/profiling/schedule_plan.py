"""Phases of steps in which two micro-batches take turns: `overlap_moe_expert_parallel_comm`.

Megatron then cuts a layer into nodes, each with its forward and its backward, and runs one
micro-batch's forward nodes between another's backward nodes, those that exchange rows on a stream
of their own (megatron/core/models/common/model_chunk_schedule_plan.py). So a phase begins where a
node's stream has waited for the node before. On a GPU, whose clock reads the computing stream, an
exchange lasts as long as that stream waits for it: what is hidden takes no time (not run on a GPU
yet). May touch: Megatron's schedule nodes and plans, undone whole.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.pipeline_parallel.utils import ScheduleNode

from megatron_mone.common import phases
from megatron_mone.common.patch import Replaced
from megatron_mone.profiling.clock import PhaseClock

# Node -> the phase in which it begins, until a module within says its own.
_FIRST = {
    "pre_dispatch_computation": phases.LAYER_NORM,
    "moe_dispatch": phases.DISPATCH,
    "mlp": phases.LAYER_NORM,
    "moe_combine": phases.LAYER_NORM,
    "mtp_post_process": phases.LOSS,
    "post_process": phases.LOSS,
    "loss_func": phases.LOSS,
}
# Nodes that exchange rows -> the phase of what waits for them.
_EXCHANGES = {"moe_dispatch": phases.DISPATCH, "moe_combine": phases.COMBINE}


def watch_schedule_plans(clock: PhaseClock) -> Callable[[], None]:
    """Let every node of Megatron's schedule plans tell `clock`; returns what undoes it."""
    acquire = ScheduleNode.stream_acquire_context
    run = TransformerModelChunkSchedulePlan.run

    @contextmanager
    def told(node: Any, name: str | None = None) -> Iterator[None]:
        back = (name or "").endswith(" backward")
        pass_, between = (
            (phases.BACKWARD, phases.LAYER_NORM) if back else (phases.FORWARD, phases.OTHER)
        )
        with acquire(node, name):  # waits first
            clock.switch(_FIRST.get(node.name, between), pass_)
            try:
                yield
            finally:
                left = _EXCHANGES.get(node.name)
                clock.switch(left or phases.OTHER, pass_ if left else phases.FORWARD)

    def run_told(*args: Any, **kwargs: Any) -> Any:
        clock.switch(phases.OTHER, phases.FORWARD)  # the loss's backward is over
        try:
            return run(*args, **kwargs)
        finally:
            clock.switch(phases.OTHER, phases.FORWARD)

    stack = ExitStack()
    stack.enter_context(Replaced(ScheduleNode, "stream_acquire_context", told))
    stack.enter_context(Replaced(TransformerModelChunkSchedulePlan, "run", staticmethod(run_told)))
    return stack.close
