"""The runs in which DeepSpeed's engine is compared with Megatron's. Names say what is not 1.

.venv/bin/python -m tests.parity.engines      # writes the tables of docs/DEEPSPEED.md anew
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_mone.common.files import atomic_write
from megatron_mone.common.marked_text import with_parts
from megatron_mone.deepspeed.settings import MOOT, STAGES
from megatron_mone.deepspeed.supported import REFUSALS
from tests.parity.layouts import (
    EP2,
    EP4,
    ETP1,
    ETP2,
    FULL_RECOMPUTE,
    MOE_RECOMPUTE,
    STOCK,
    TP2,
    TRAIN,
)

MODELS = {"MoNE": TRAIN, "stock": (*STOCK, "--clip-grad", "1.0", "--adam-eps", "1e-3")}
ONCE = ("--global-batch-size", "4")
FOUR_TIMES = ("--global-batch-size", "16")
OFFLOAD = ("--zero-offload-optimizer",)
BF16 = ("--bf16",)
BIASED = (
    *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    *("--moe-router-load-balancing-type", "none", "--moe-aux-loss-coeff", "0"),
)


@dataclass(frozen=True)
class Engines:
    """A layout and what DeepSpeed shards in it.

    Attributes:
        ranks: of the run.
        stages: of ZeRO.
        flags: of both engines.
        own: of DeepSpeed's.
        tolerance: relative, of losses, gradients and parameters.
    """

    ranks: int
    stages: tuple[int, ...]
    flags: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    tolerance: float = 1e-5


ENGINES = {
    "DP2, one micro-batch": Engines(2, (0, 1, 2, 3), ONCE),
    "DP2, four micro-batches": Engines(2, (0, 1, 2, 3), FOUR_TIMES),
    "DP2, optimizer on the host": Engines(2, (1, 2, 3), own=OFFLOAD),
    "DP2, bf16": Engines(2, (1, 2, 3), BF16),
    "EP2": Engines(2, (0, 1, 2), EP2),
    "EP2, four micro-batches": Engines(2, (0, 1, 2), (*EP2, *FOUR_TIMES)),
    "EP2, recompute": Engines(2, (1, 2), (*EP2, *MOE_RECOMPUTE)),
    "TP2 ETP2": Engines(2, (0, 1, 2, 3), (*TP2, *ETP2)),
    "TP2 ETP1 EP2": Engines(2, (0, 1, 2), (*TP2, *ETP1, *EP2)),
    "CP2": Engines(2, (1, 3), ("--context-parallel-size", "2")),
    "DP2, MTP, a shared expert": Engines(
        2, (1, 3), ("--mtp-num-layers", "1", "--moe-shared-expert-intermediate-size", "32")
    ),
    "DP2, full recompute, dropout": Engines(
        2, (2, 3), (*FULL_RECOMPUTE, "--hidden-dropout", "0.1", "--attention-dropout", "0.1")
    ),
    "EP2, biased router, SGD": Engines(2, (0, 2), (*EP2, *BIASED, "--optimizer", "sgd")),
    "DP4 EP2": Engines(4, (0, 1, 2), (*EP2, *ONCE, "--micro-batch-size", "1")),
    "DP4 EP2, bf16": Engines(4, (1, 2), (*EP2, *BF16)),
    "EP4": Engines(4, (0, 1, 2), EP4),
    "EP4, four micro-batches": Engines(4, (1, 2), (*EP4, *FOUR_TIMES, "--micro-batch-size", "1")),
    "DP2 TP2 EP2": Engines(4, (0, 1, 2), (*TP2, *ETP1, *EP2)),
}
PAGE = Path(__file__).parents[2] / "docs" / "DEEPSPEED.md"


def with_tables(text: str) -> str:
    """The page, with what is trained and what is refused written anew."""
    return with_parts(with_parts(text, "trained", _trained), "refused", _refused)


def _trained(of: str) -> str:
    head = " | ".join(f"ZeRO {stage}" for stage in STAGES)
    lines = [
        f"| MoNE and stock experts | ranks | {head} |",
        f"| --- | --: |{' --- |' * len(STAGES)}",
    ]
    for name, one in ENGINES.items():
        cells = " | ".join("equal" if stage in one.stages else "" for stage in STAGES)
        lines.append(f"| {name} | {one.ranks} | {cells} |")
    return "\n".join(lines)


def _refused(of: str) -> str:
    lines = ["| refused | why | what to do |", "| --- | --- | --- |"]
    lines += [f"| {one.words} | {one.reason} | {one.fix} |" for one in REFUSALS]
    lines += [
        f"| `{flag[2:].replace('-', '_')}`, not refused | {why} | nothing: a line says so |"
        for flag, why in MOOT.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    atomic_write(PAGE, with_tables(PAGE.read_text(encoding="utf-8")).encode())
