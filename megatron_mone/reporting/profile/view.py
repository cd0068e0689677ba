"""What the pages, plots and sentences of a profile say alike: names, units, ratios, skew.

Arithmetic on a profile; touches no files.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from megatron_mone.common.phases import PHASES
from megatron_mone.profiling.compare import STEP, Row, compare
from megatron_mone.profiling.profile_document import Profile, ProfiledRun

NAMES = {
    "mone": "MoNE",
    "moe": "MoE",
    "moe-active": "MoE same active",
    "grouped_mm": "MoE grouped_mm",
    "megatron": "Megatron",
    "deepspeed": "DeepSpeed",
    "deepspeed-moe": "DeepSpeed MoE",
}
"""Of the runs that tools/profile.py names itself."""
SMALL_PHASE = 0.005
"""Share of the step under which a phase is left out of a drawing by phase."""
_GPU_BACKENDS = {"triton", "te", "sparse24"}
MINUS = "\u2212"


class Named(Protocol):
    """A profiled run or a planned model."""

    @property
    def name(self) -> str:
        """Of the run or model."""


def name_of(run: Named) -> str:
    """The run's name for people, short enough for a table's head."""
    return short(NAMES.get(run.name, run.name), 24)


def short(text: str, most: int = 44) -> str:
    """One line of at most `most` characters; the middle gives way: hosts differ at their ends."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def subject(profile: Profile) -> ProfiledRun:
    """The run that the report is about: the first."""
    return profile.runs[0]


def baselines(profile: Profile) -> list[ProfiledRun]:
    """The runs it is held against, in the order they were named."""
    return profile.runs[1:]


def device_class(profile: Profile) -> str:
    """ "GPU ranks" or "CPU ranks"; the number stands before it."""
    backends = {run.backend for run in profile.runs}
    gpu = "GPU" in profile.config.machine or backends & _GPU_BACKENDS
    return f"{'GPU' if gpu else 'CPU'} rank{'' if profile.ranks.world_size == 1 else 's'}"


def tokens_per_second(profile: Profile, run: ProfiledRun) -> float:
    """Tokens a second of the whole job."""
    return 1e3 * profile.config.tokens_per_step / run.step_ms


def peak_bytes(run: ProfiledRun) -> int | None:
    """The highest peak of any rank; None without a memory pass."""
    return None if run.memory is None else run.memory.peak_bytes


def changes(profile: Profile, other: ProfiledRun) -> dict[str, Row]:
    """The first run against baseline `other`: ms of the step (key STEP) and of each phase."""
    found = compare(
        profile, profile, other.name, subject(profile).name,
        threshold=0.0, same_job=True, allow_different=False,
    )  # fmt: skip
    return {row.what: row for row in found.rows}


def speed_verdict(profile: Profile, other: ProfiledRun) -> str:
    """ "faster", "slower" or "not clearly different": the first run's step against `other`'s.

    Not clearly different where the 95% interval of the difference holds 0 or cannot be known.
    """
    step = changes(profile, other)[STEP]
    if not step.significant:
        return "not clearly different"
    return "faster" if step.b < step.a else "slower"


def large_phases(runs: Iterable[ProfiledRun]) -> list[str]:
    """Phases above SMALL_PHASE of the step in any of `runs`, in the order of phases.PHASES."""
    return [
        phase
        for phase in PHASES
        if any(run.phases.get(phase, 0.0) > SMALL_PHASE * run.step_ms for run in runs)
    ]


def all_phases(runs: Iterable[ProfiledRun]) -> list[str]:
    """Phases that took any time in any of `runs`, in the order of phases.PHASES."""
    return [phase for phase in PHASES if any(run.phases.get(phase) for run in runs)]


def skew_note(profile: Profile) -> str:
    """The facts without which no time may be quoted: row skew of every run, neurons kept, routing.

    Returns:
        Sentences for a caption.
    """
    rows = [
        f"{name_of(run)} {run.routing.rows_max_over_mean:.2f}"
        for run in profile.runs
        if run.routing.layers
    ]
    kept = [
        f"{name_of(run)} {run.neurons.kept_ratio:.1%}"
        for run in profile.runs
        if run.neurons is not None
    ]
    parts = [f"busiest expert's rows over the mean: {', '.join(rows)}"] if rows else []
    parts += [f"neurons kept: {', '.join(kept)}"] if kept else []
    parts.append(f"routing: {short(profile.config.routing)}")
    return f"Skew: {'; '.join(parts)}."


def rank_ranges(ranks: Sequence[int], most: int = 12) -> str:
    """ "3, 17-19 and 40 more": ranks as ranges, at most `most` of them."""
    ranges: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges[:most])
    left = sum(b - a + 1 for a, b in ranges[most:])
    return f"{shown} and {left} more" if left else shown


def engineering(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1.23 TFLOP."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"),
                           (1e3, "k")):  # fmt: skip
        if value >= 0.9995 * factor:
            return f"{_three(value / factor)} {prefix}{unit}"
    return f"{_three(value)} {unit}".rstrip()


def mebibytes(value: float) -> str:
    """Bytes as MiB, from 10 GiB on as GiB."""
    if value >= 10 * 2**30:
        return f"{value / 2**30:,.1f} GiB"
    return f"{_three(value / 2**20)} MiB"


def milliseconds(value: float) -> str:
    """Three digits, without the unit."""
    return _three(value)


def signed_ms(value: float) -> str:
    """A difference with its sign, a true minus sign."""
    size = _three(abs(value))
    if not float(size.replace(",", "")):
        return size
    return f"{MINUS if value < 0 else '+'}{size}"


def _three(value: float) -> str:
    """At least three digits, never an exponent."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
