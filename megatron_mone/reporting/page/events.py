"""Scalars and histograms of a run's TensorBoard folder, over restarts.

Each process that trains writes its own event file. A restarted run repeats the steps after its
checkpoint, so a later file replaces everything from its own first step on, tag by tag.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]
"""(step, value) points by rising step; values of one step are averaged."""


@dataclass(frozen=True)
class Histogram:
    """One histogram of one step.

    Attributes:
        step: optimizer step.
        limits: upper limit of each bucket; the first bucket starts at 0.
        counts: values in each bucket.
    """

    step: int
    limits: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Events:
    """Everything a TensorBoard folder holds, by tag."""

    scalars: dict[str, Curve]
    histograms: dict[str, list[Histogram]]


def read_events(folder: Path) -> Events:
    """Read every event file of `folder`, oldest first; a folder without any gives no tags."""
    scalars: dict[str, Curve] = {}
    histograms: dict[str, list[Histogram]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=_started):
        file_scalars, file_histograms = _read_file(path)
        for tag, points in file_scalars.items():
            first = min(step for step, _ in points)
            earlier = [point for point in scalars.get(tag, []) if point[0] < first]
            scalars[tag] = earlier + points
        for tag, entries in file_histograms.items():
            begin = min(entry.step for entry in entries)
            kept = [entry for entry in histograms.get(tag, []) if entry.step < begin]
            histograms[tag] = kept + entries
    return Events({tag: _mean_by_step(points) for tag, points in scalars.items()}, histograms)


def _started(path: Path) -> tuple[float, str]:
    """The time in `events.out.tfevents.SECONDS.HOST.PID.N`, then the name."""
    seconds = path.name.split(".")[3]
    return (float(seconds) if seconds.isdigit() else 0.0, path.name)


def _read_file(path: Path) -> tuple[dict[str, Curve], dict[str, list[Histogram]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps every event; the default would thin them out.
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    scalars = {
        tag: [(event.step, float(event.value)) for event in accumulator.Scalars(tag)]
        for tag in tags["scalars"]
    }
    histograms = {
        tag: [_histogram(event) for event in accumulator.Histograms(tag)]
        for tag in tags["histograms"]
    }
    return scalars, histograms


def _histogram(event: Any) -> Histogram:
    value = event.histogram_value
    return Histogram(event.step, tuple(value.bucket_limit), tuple(value.bucket))


def _mean_by_step(points: Curve) -> Curve:
    """Megatron evaluates the last step twice, on different samples: both count."""
    by_step: dict[int, list[float]] = {}
    for step, value in points:
        by_step.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]
