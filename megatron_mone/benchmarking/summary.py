"""What the numbers of a grid say: the best MoNE backend of each cell and ratio, and where it wins.

Reads the content of results.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from megatron_mone.benchmarking.goals import UNNAMED, WORDS, Phase, goal_of
from megatron_mone.kernels.race_results import CellConfig, CellResults, RaceResults, Row

AUTO = "mone-auto"


@dataclass(frozen=True)
class Point:
    """MoNE against the best dense peers in one cell at one ratio.

    Attributes:
        config: of the cell.
        ratio: r.
        mone: row of the fastest MoNE backend, forward and backward together.
        best: row of the fastest dense peer.
        forward: MoNE's forward time over the fastest dense forward.
        forward_backward: the same of forward and backward together.
        saved: MoNE's bytes kept over the least that a dense peer keeps.
        limit: MoNE's roofline over the dense one, forward and backward together.
        goals: the most that `forward` and `forward_backward` may be (goals.py); None on a GPU.
    """

    config: CellConfig
    ratio: float
    mone: Row
    best: Row
    forward: float
    forward_backward: float
    saved: float
    limit: float
    goals: dict[Phase, float | None]

    def above(self, phase: Phase) -> bool:
        """Whether a figure is above its goal, as both are shown."""
        goal = self.goals[phase]
        return goal is not None and round(getattr(self, phase), 2) > goal


def points(results: RaceResults) -> list[Point]:
    """All cells and ratios where both a MoNE backend and a dense peer ran and agreed, and the peer
    is no straw man."""
    fair = [cell for cell in results.cells if not only_slow_bf16(cell, results)]
    here = class_of(results)
    return [point for cell in fair for point in _points_of(cell, here)]


def class_of(results: RaceResults) -> str:
    """Of the machine: avx2, avx512, amx, or a GPU's; of older results by what is not in them."""
    return results.machine.get("Class", "sm" if "GPU" in results.machine else UNNAMED)


def only_slow_bf16(cell: CellResults, results: RaceResults) -> bool:
    """Whether dense peers multiplied in bf16 alone where this machine multiplies float32 faster."""
    rates = results.peaks.flops
    slow = cell.config.dtype == "bf16" and rates["bf16"] < rates["fp32"]
    return slow and not any(row.dense and row.in_float32 for row in cell.agreeing)


def _points_of(cell: CellResults, machine_class: str) -> Iterator[Point]:
    dense = [row for row in cell.agreeing if row.dense]
    if not dense:
        return
    best = min(dense, key=lambda row: row.ratio_to_best_dense)
    least_saved = min(row.saved_bytes for row in dense)
    for ratio in cell.config.ratios:
        ours = [row for row in cell.agreeing if row.ratio == ratio]
        if ours:
            mone = min(ours, key=lambda row: row.ratio_to_best_dense)
            yield Point(
                config=cell.config,
                ratio=ratio,
                mone=mone,
                best=best,
                forward=min(row.ratio_to_best_dense_forward for row in ours),
                forward_backward=mone.ratio_to_best_dense,
                saved=mone.saved_bytes / least_saved,
                limit=mone.limit_forward_backward_ms / best.limit_forward_backward_ms,
                goals={phase: goal_of(cell.config, ratio, phase, machine_class) for phase in WORDS},
            )


def where_mone_wins(found: list[Point]) -> list[str]:
    """Sentences about the points, from the data alone."""
    if not found:
        return ["No cell holds both a MoNE backend and a dense peer: nothing can be said."]
    texts = []
    for what, field in (("Forward and backward", "forward_backward"), ("Forward alone", "forward")):
        wins = [point for point in found if getattr(point, field) < 1]
        texts.append(
            f"{what}: MoNE is faster than the fastest dense peer in {len(wins)} of {len(found)} "
            "(cell, ratio) pairs."
        )
        for chosen, word in ((min, "best"), (max, "worst")):
            point = chosen(found, key=lambda p: getattr(p, field))  # type: ignore[operator]
            texts.append(
                f"{what}, {word}: {getattr(point, field):.2f} of the fastest dense peer's time at "
                f"r = {fraction(point.ratio)}, {point.config.label}."
            )
    bf16 = [point for point in found if point.config.dtype == "bf16"]
    if any(point.best.in_float32 for point in bf16):
        wide = sum(point.best.in_float32 for point in bf16)
        texts.append(
            f"In {wide} of {len(bf16)} pairs in bf16 the fastest dense peer multiplies in float32, "
            "which torch does faster here: the ratio is to that one."
        )
    saved = [point for point in found if point.saved < 1]
    texts.append(
        f"Memory kept for the backward: less than any dense peer in {len(saved)} of {len(found)} "
        f"pairs, from {min(p.saved for p in found):.2f} to {max(p.saved for p in found):.2f} of it."
    )
    return texts


def fraction(ratio: float) -> str:
    """0.25 -> 1/4; other values as they are."""
    exact = Fraction(ratio).limit_denominator(64)
    return str(exact) if abs(float(exact) - ratio) < 1e-9 else f"{ratio:g}"
