"""Two layouts: where the difference of their steps and of their memory goes, part by part.

Touches nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from megatron_mone.planning.cost.prediction import Prediction
from megatron_mone.planning.job import short_layout
from megatron_mone.planning.plan_document import ComparedLayout, Comparison, PartDifference
from megatron_mone.planning.plan_parts import GIB
from megatron_mone.planning.planner import Planned

_SMALL = 0.0005  # of the step or the peak; a part that is not shown in a terminal


def compared(name: str, planned: Planned) -> ComparedLayout:
    """One of the two.

    Args:
        name: of its run file.
        planned: of it.
    """
    prediction = planned.prediction
    return ComparedLayout(
        name=name,
        layout=short_layout(planned.job.values()),
        fits=prediction.fits,
        step_ms=1e3 * prediction.seconds,
        peak_gib=prediction.peak / GIB,
    )


def step_parts(prediction: Prediction) -> dict[str, float]:
    """Seconds of a step by part, the bubble as fill and imbalance; they add up to it."""
    parts = dict(prediction.parts)
    bubble = parts.pop("bubble")
    fill = bubble - prediction.imbalance
    return {**parts, "pipeline fill": fill, "stage imbalance": prediction.imbalance}


def memory_parts(prediction: Prediction) -> dict[str, float]:
    """Bytes of the fullest stage by part; they add up to the peak."""
    return asdict(prediction.memory_P[prediction.fullest])


def differences(
    first: Mapping[str, float], second: Mapping[str, float], unit: float
) -> list[PartDifference]:
    """A row a part, the largest difference first.

    Args:
        first, second: part -> its size; a part that only one has is nothing in the other.
        unit: of the rows over that of the sizes.
    """
    rows = []
    for part in dict.fromkeys([*first, *second]):
        one, other = unit * first.get(part, 0.0), unit * second.get(part, 0.0)
        if one or other:
            row = PartDifference(part=part, first=one, second=other, difference=other - one)
            rows.append(row)
    return sorted(rows, key=lambda row: -abs(row.difference))


def comparison_table(document: Comparison) -> str:
    """For a terminal."""
    first, second = document.first, document.second
    head = f"{document.model} on {document.gpus} x {document.cluster.device}"
    lines = [
        head,
        f"first:  {first.name}: {first.layout}",
        f"second: {second.name}: {second.layout}",
    ]
    total = PartDifference(
        part="step", first=first.step_ms, second=second.step_ms,
        difference=second.step_ms - first.step_ms,
    )  # fmt: skip
    lines += _rows("ms", [*document.step_ms, total], _SMALL * first.step_ms, ",.0f")
    lines += _rows("ms of compute", document.compute_ms, _SMALL * first.step_ms, ",.0f")
    peak = PartDifference(
        part="peak", first=first.peak_gib, second=second.peak_gib,
        difference=second.peak_gib - first.peak_gib,
    )  # fmt: skip
    lines += _rows("GiB", [*document.memory_gib, peak], _SMALL * first.peak_gib, ",.2f")
    fits = [one.name for one in (first, second) if not one.fits]
    if fits:
        lines.append(f"does not fit: {', '.join(fits)}")
    return "\n".join(lines)


def _rows(unit: str, rows: Iterable[PartDifference], least: float, form: str) -> list[str]:
    lines = [f"{unit:22} {'first':>11} {'second':>11} {'difference':>11}"]
    for one in rows:
        if max(abs(one.first), abs(one.second)) >= least:
            figures = (f"{one.first:11{form}}", f"{one.second:11{form}}")
            lines.append(f"  {one.part:20} {' '.join(figures)} {one.difference:+11{form}}")
    return lines
