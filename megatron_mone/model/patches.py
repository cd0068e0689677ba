"""Every lasting change of Megatron and torch in a training process, in one table.

Each stands beside the code that it calls. Not here: the CPU ranks' (cpu_emulation), and what holds
for a while (common/patch.py: Replaced). A model that another script builds needs the first three
alone, and brings them: mone_layer_spec, and whoever declares stacked weights.
"""

from megatron_mone.checkpoint import (
    choice,
    optimizer_layout,
    save,
    schedule,
    signals,
    upcycling,
    verify,
)
from megatron_mone.common import patch
from megatron_mone.deepspeed import attach
from megatron_mone.model import arguments, layer_spec, liveness
from megatron_mone.model.trackers import attach as trackers
from megatron_mone.moe import matrix_stack, shard_checkpoint, stored_choice

PATCHES = (
    *matrix_stack.PATCHES,
    *layer_spec.PATCHES,
    *stored_choice.PATCHES,
    *shard_checkpoint.PATCHES,
    *choice.PATCHES,
    *arguments.PATCHES,
    *liveness.PATCHES,
    *save.PATCHES,
    *verify.PATCHES,
    *optimizer_layout.PATCHES,
    *schedule.PATCHES,
    *upcycling.PATCHES,
    *signals.PATCHES,
    *attach.PATCHES,
    *trackers.PATCHES,
)


def install() -> None:
    """Make them all; once in a process, before Megatron's arguments are read."""
    patch.install(PATCHES)
