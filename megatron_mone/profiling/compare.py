"""Two runs of `profile.json` files: phase by phase, with confidence, and whether B got worse.

Reads the profiles it is given and writes nothing. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mone.common import checked_json
from megatron_mone.common.checked_json import Field
from megatron_mone.common.phases import PHASES
from megatron_mone.profiling import resample
from megatron_mone.profiling.merge import PROFILE
from megatron_mone.profiling.merge import SCHEMA as PROFILE_SCHEMA

LEAST_SHARE = 0.01
"""Smaller phases of a step are no regression on their own."""
STEP = "step_ms"
PEAK_MEMORY = "peak memory"
_FIX = "merge its rank files again with tools/merge_profile.py"
_CONFIG = ("routing", "micro_batches", "tokens_per_step")


@dataclass(frozen=True)
class Row:
    """One quantity of two runs; ms, or bytes for peak memory.

    Attributes:
        ratio: b / a; None where a is 0.
        lower, upper: 95% interval of b - a; None where it cannot be known.
        regression: over the threshold, and not by chance.
    """

    what: str
    a: float
    b: float
    ratio: float | None
    lower: float | None
    upper: float | None
    regression: bool

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.lower is not None and self.upper is not None and self.lower * self.upper > 0


@dataclass(frozen=True)
class Comparison:
    """Run B against run A.

    Attributes:
        a, b: names of the runs.
        rows: the step, its phases, peak memory where both runs have it.
        differs: (field, value of A, value of B) of what was not the same.
        drawn: what the bootstrap drew, "windows" or "steps".
        paired: whether windows of both runs were drawn together.
    """

    a: str
    b: str
    rows: list[Row]
    differs: list[tuple[str, Any, Any]]
    drawn: str
    paired: bool

    @property
    def regressions(self) -> list[str]:
        """What got worse."""
        return [row.what for row in self.rows if row.regression]


def profile_path(path: Path) -> Path:
    """The profile of a folder, or the file itself."""
    return path / PROFILE if path.is_dir() else path


def read_profile(path: Path) -> dict[str, Any]:
    """The profile in a file, or in a folder's profile.json; the fields read here are checked.

    Raises:
        ValueError: one line that names the file, the field and the fix.
    """
    path = profile_path(path)
    profile = checked_json.load(path, f"give a {PROFILE} or its folder")
    root = Field(profile, path, _FIX)
    checked_json.check_schema(root, PROFILE_SCHEMA)
    root["ranks"]["world_size"].whole()
    list(root["config"]["layout"].members())
    root["config"]["routing"].text()
    root["config"]["micro_batches"].whole()
    root["config"]["tokens_per_step"].whole()
    for run in root["runs"].elements():
        _check_run(run)
    return profile


def _check_run(run: Field) -> None:
    run["name"].text()
    run["backend"].text()
    list(run["model"].members())
    samples = run["samples"]
    steps = len(samples["steps"].numbers())
    if not steps:
        samples["steps"].fail("is empty")
    samples["windows"].numbers(steps)
    samples["step_ms"].numbers(steps)
    for phase, times in samples["phases"].members():
        if phase not in PHASES:
            samples["phases"].fail(f"{phase!r} is no phase of this version")
        times.numbers(steps)
    if not samples["phases"].value:
        samples["phases"].fail("is empty")
    if run["memory"].value is not None:
        run["memory"]["peak_bytes"].whole()


def run_names(profile: dict[str, Any]) -> list[str]:
    """Names of a profile's runs, in order."""
    return [run["name"] for run in profile["runs"]]


def compare(
    profile_a: dict[str, Any],
    profile_b: dict[str, Any],
    name_a: str,
    name_b: str,
    *,
    threshold: float,
    same_job: bool,
    allow_different: bool,
) -> Comparison:
    """Compare run `name_b` of one profile with run `name_a` of another.

    Args:
        profile_a, profile_b: from `read_profile`.
        threshold: growth that is a regression, as a share of A's value.
        same_job: both runs were measured in interleaved windows of one job.
        allow_different: compare runs of different models and layouts. Runs of different names may
            differ in their model without it.

    Raises:
        ValueError: a run is absent, or the runs differ and may not; one line.
    """
    run_a, run_b = _find(profile_a, name_a, "A"), _find(profile_b, name_b, "B")
    settings = _differing_settings(profile_a, profile_b)
    model = _named("model", run_a["model"], run_b["model"])
    refused = settings + (model if name_a == name_b else [])
    if refused and not allow_different:
        field, value_a, value_b = refused[0]
        raise ValueError(
            f"{field} is {value_a!r} in A and {value_b!r} in B: profile both with one value, or "
            "compare all the same with --allow-different"
        )
    backend = _named("", {"backend": run_a["backend"]}, {"backend": run_b["backend"]})
    names = [
        phase
        for phase in PHASES
        if phase in run_a["samples"]["phases"] or phase in run_b["samples"]["phases"]
    ]
    samples_a, samples_b = _samples(run_a, names), _samples(run_b, names)
    interval = resample.difference(samples_a, samples_b, same_job=same_job)
    return Comparison(
        a=name_a,
        b=name_b,
        rows=_rows([STEP, *names], interval, threshold) + _memory_row(run_a, run_b, threshold),
        differs=settings + model + backend,
        drawn=interval.drawn,
        paired=interval.paired,
    )


def _find(profile: dict[str, Any], name: str, side: str) -> dict[str, Any]:
    for run in profile["runs"]:
        if run["name"] == name:
            return run
    there = ", ".join(run_names(profile)) or "none"
    raise ValueError(f"{side} has no run {name!r}; its runs are: {there}")


def _differing_settings(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return (
        _named("config.layout", a["config"]["layout"], b["config"]["layout"])
        + _named("config", *({key: one["config"][key] for key in _CONFIG} for one in (a, b)))
        + _named("ranks", *({"world_size": one["ranks"]["world_size"]} for one in (a, b)))
    )


def _named(place: str, a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (f"{place}.{key}" if place else key, value_a, value_b)
        for key, value_a, value_b in checked_json.differences(a, b)
    ]


def _samples(run: dict[str, Any], names: list[str]) -> resample.Samples:
    """The steps of a run: their time, mean over ranks, then the phases `names`."""
    samples = run["samples"]
    none = [0.0] * len(samples["steps"])
    phases = np.array([samples["phases"].get(name, none) for name in names], dtype=np.float64)
    return resample.Samples(
        windows=np.asarray(samples["windows"]),
        slowest_ms=np.asarray(samples["step_ms"], dtype=np.float64),
        # A step is in one phase at any moment, so that phases add up to its mean over ranks.
        values_KS=np.vstack([phases.sum(axis=0), phases]),
    )


def _rows(names: list[str], interval: resample.Interval, threshold: float) -> list[Row]:
    step_b = float(interval.b_K[0])
    rows = []
    for k, name in enumerate(names):
        a, b = float(interval.a_K[k]), float(interval.b_K[k])
        lower = None if interval.lower_K is None else float(interval.lower_K[k])
        upper = None if interval.upper_K is None else float(interval.upper_K[k])
        sure = lower is not None and lower > 0 and b >= LEAST_SHARE * step_b
        worse = sure and b > (1 + threshold) * a
        rows.append(Row(name, a, b, b / a if a else None, lower, upper, worse))
    return rows


def _memory_row(run_a: dict[str, Any], run_b: dict[str, Any], threshold: float) -> list[Row]:
    if run_a["memory"] is None or run_b["memory"] is None:
        return []
    a, b = (float(run["memory"]["peak_bytes"]) for run in (run_a, run_b))
    worse = b > (1 + threshold) * a
    return [Row(PEAK_MEMORY, a, b, b / a if a else None, None, None, worse)]
