"""Two runs of `profile.json` files: phase by phase, with confidence, and whether B got worse.

Reads the profiles it is given and writes nothing. Imports no torch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mone.common.checked_json import differences
from megatron_mone.common.phases import PHASES
from megatron_mone.profiling import resample
from megatron_mone.profiling.profile_document import Profile, ProfiledRun

LEAST_SHARE = 0.01
"""Smaller phases of a step are no regression on their own."""
STEP = "step_ms"
PEAK_MEMORY = "peak memory"
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


def run_names(profile: Profile) -> list[str]:
    """Names of a profile's runs, in order."""
    return [run.name for run in profile.runs]


def compare(
    profile_a: Profile,
    profile_b: Profile,
    name_a: str,
    name_b: str,
    *,
    threshold: float,
    same_job: bool,
    allow_different: bool,
) -> Comparison:
    """Compare run `name_b` of one profile with run `name_a` of another.

    Args:
        profile_a, profile_b: hold the runs.
        threshold: growth that is a regression, as a share of A's value.
        same_job: both runs were measured in interleaved windows of one job.
        allow_different: compare runs of different models and layouts. Runs of different names may
            differ in their model without it.

    Raises:
        ValueError: a run is absent, or the runs differ and may not; one line.
    """
    run_a, run_b = _find(profile_a, name_a, "A"), _find(profile_b, name_b, "B")
    settings = _differing_settings(profile_a, profile_b)
    model = _named("model", run_a.model, run_b.model)
    refused = settings + (model if name_a == name_b else [])
    if refused and not allow_different:
        field, value_a, value_b = refused[0]
        raise ValueError(
            f"{field} is {value_a!r} in A and {value_b!r} in B: profile both with one value, or "
            "compare all the same with --allow-different"
        )
    backend = _named("", {"backend": run_a.backend}, {"backend": run_b.backend})
    names = [
        phase for phase in PHASES if phase in run_a.samples.phases or phase in run_b.samples.phases
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


def _find(profile: Profile, name: str, side: str) -> ProfiledRun:
    for run in profile.runs:
        if run.name == name:
            return run
    there = ", ".join(run_names(profile)) or "none"
    raise ValueError(f"{side} has no run {name!r}; its runs are: {there}")


def _differing_settings(a: Profile, b: Profile) -> list[tuple[str, Any, Any]]:
    return (
        _named("config.layout", a.config.layout.plain(), b.config.layout.plain())
        + _named("config", *({key: getattr(one.config, key) for key in _CONFIG} for one in (a, b)))
        + _named("ranks", *({"world_size": one.ranks.world_size} for one in (a, b)))
    )


def _named(place: str, a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (f"{place}.{key}" if place else key, value_a, value_b)
        for key, value_a, value_b in differences(a, b)
    ]


def _samples(run: ProfiledRun, names: list[str]) -> resample.Samples:
    """The steps of a run: their time, mean over ranks, then the phases `names`."""
    samples = run.samples
    none = [0.0] * len(samples.steps)
    phases = np.array([samples.phases.get(name, none) for name in names], dtype=np.float64)
    return resample.Samples(
        windows=np.asarray(samples.windows),
        slowest_ms=np.asarray(samples.step_ms, dtype=np.float64),
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


def _memory_row(run_a: ProfiledRun, run_b: ProfiledRun, threshold: float) -> list[Row]:
    if run_a.memory is None or run_b.memory is None:
        return []
    a, b = float(run_a.memory.peak_bytes), float(run_b.memory.peak_bytes)
    worse = b > (1 + threshold) * a
    return [Row(PEAK_MEMORY, a, b, b / a if a else None, None, None, worse)]
