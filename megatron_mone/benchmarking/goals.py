"""What MoNE's experts are to reach on a CPU, as shares of the fastest dense peer of the same run.

One table, which the report sets beside its figures; nothing else depends on it. The arithmetic
limits at r = 1/4 are 0.33 for forward and backward and 0.50 for forward alone.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_mone.kernels.race_results import CellConfig

Phase = Literal["forward", "forward_backward"]
WORDS: dict[Phase, str] = {"forward": "forward", "forward_backward": "forward + backward"}
CEILING = 1.03
"""The most in any cell at any r, where no goal is lower."""
LARGE_BLOCK = 128  # neurons of a block whose rows fill GEMMs of their own
DECODE_ROWS = 8  # of an expert, at most, where a forward pass decodes
UNNAMED = "not recorded"  # the class of a CPU in older results
CPU_CLASSES = ("avx2", "avx512", "amx", UNNAMED)
PARTS = {
    "the fastest dense forward": ("choosing neurons", 0.05),
    "forward + backward of the layer": ("balance loss, load counters and masks", 0.04),
}
"""What parts are together, and the most that they may take, of what `PartTime.of` names."""


@dataclass(frozen=True)
class Goal:
    """One figure: E 8, H 512, F 1408, at one r, balanced and skewed alike.

    Attributes:
        most: of the fastest dense peer's time.
        phase: of what.
        ratio: r.
        dtype: of the experts.
        blocks: least and most neurons chosen together.
        rows: least and most routed rows.
        classes: of machines.
    """

    most: float
    phase: Phase
    ratio: float
    dtype: str = "fp32"
    blocks: tuple[int, int] = (1, 1)
    rows: tuple[int, int] = (4096, 4096)
    classes: tuple[str, ...] = CPU_CLASSES

    def takes(self, config: CellConfig, ratio: float, phase: Phase) -> bool:
        """Whether it is a goal of a figure of that cell."""
        return (
            (config.experts, config.hidden, config.neurons) == (8, 512, 1408)
            and (config.dtype, ratio, phase) == (self.dtype, self.ratio, self.phase)
            and self.blocks[0] <= config.neuron_block <= self.blocks[1]
            and self.rows[0] <= config.tokens <= self.rows[1]
        )


_AMX = ("amx",)
GOALS = (
    Goal(0.60, "forward", 1 / 4),
    Goal(0.45, "forward_backward", 1 / 4),
    Goal(0.33, "forward_backward", 1 / 8),
    Goal(0.25, "forward_backward", 1 / 16),
    Goal(0.42, "forward_backward", 1 / 4, blocks=(LARGE_BLOCK, 1408)),
    Goal(0.60, "forward_backward", 1 / 4, "bf16", blocks=(32, 32), classes=_AMX),
    Goal(0.60, "forward", 1 / 4, "bf16", rows=(1, 8 * DECODE_ROWS), classes=_AMX),
)


def goals_of(machine_class: str) -> list[Goal]:
    """The goals of a class of machine; none of a GPU."""
    return [goal for goal in GOALS if machine_class in goal.classes]


def goal_of(config: CellConfig, ratio: float, phase: Phase, machine_class: str) -> float | None:
    """The most that a figure may be; None where the machine is no CPU."""
    if machine_class not in CPU_CLASSES:
        return None
    taking = [g.most for g in goals_of(machine_class) if g.takes(config, ratio, phase)]
    return min([CEILING, *taking])
