"""The options of `megatron-mone profile`, shared by its ranks and by `submit --profile`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from megatron_mone.profiling.baselines import run_specs

ROUTINGS = ("real", "balanced", "replayed")
SETTLING_STEPS = 1
"""Unmeasured steps at the head of a window, while the caches still hold another run."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        steps: measured of each run.
        windows: into how many turns a run's steps are split.
        warm_up: steps of each run before the first window.
        against: baselines (see baselines.py).
        routing: "real": each run routes for itself; "balanced": Megatron spreads tokens evenly;
            "replayed": all runs route as the first one does.
        memory: whether to watch memory, in two steps after the timed ones.
        trace: whether to write a trace, of one more step.
        out: folder of the profile.
    """

    steps: int
    windows: int
    warm_up: int
    against: tuple[str, ...]
    routing: str
    memory: bool
    trace: bool
    out: Path

    @property
    def window_steps(self) -> list[int]:
        """Measured steps of each window: as even as they can be."""
        return [len(range(i, self.steps, self.windows)) for i in range(self.windows)]

    @property
    def steps_of_a_run(self) -> int:
        """All steps that one run takes, measured or not."""
        watched = 2 * self.memory + self.trace
        return self.warm_up + self.windows * SETTLING_STEPS + self.steps + watched

    @property
    def total_steps(self) -> int:
        """Of all runs."""
        return self.steps_of_a_run * (1 + len(self.against))


@dataclass(frozen=True)
class Asked:
    """The options as typed."""

    steps: Annotated[int, Option(help="measured steps of each run")] = 20
    windows: Annotated[
        int | None, Option(help="turns that the steps are split into (5, or a step each)")
    ] = None
    warm_up: Annotated[int, Option(help="steps of each run before the first window")] = 3
    against: Annotated[
        str,
        Option(
            help="baselines, by comma: moe, moe-active, grouped_mm, deepspeed, deepspeed-moe, "
            "megatron, or NAME:field=value"
        ),
    ] = ""
    routing: Annotated[
        str, Option(help="real, balanced, or replayed: all runs route as the first")
    ] = "real"
    no_memory: Annotated[bool, Option("--no-memory", help="leave the memory ledger out")] = False
    trace: Annotated[
        bool, Option("--trace", help="also write a torch profiler trace of one step a run")
    ] = False
    out: Annotated[Path, Option(help="folder to write")] = Path("out/profile")


def read_options(parsed: Asked) -> Options:
    """Check what was given.

    Raises:
        ValueError: one line that names the flag, its value and what is allowed.
    """
    for name in ("steps", "windows", "warm_up"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not allowed: give at least 1")
    windows = parsed.windows or min(5, parsed.steps)
    if windows > parsed.steps:
        raise ValueError(
            f"--windows {windows} is more than --steps {parsed.steps}: a window needs a step"
        )
    if parsed.routing not in ROUTINGS:
        raise ValueError(f"--routing {parsed.routing!r} is not one of {', '.join(ROUTINGS)}")
    against = tuple(name for name in parsed.against.split(",") if name)
    run_specs(against)
    if parsed.out.exists() and not parsed.out.is_dir():
        raise ValueError(f"--out {parsed.out} is a file: name a folder")
    return Options(
        steps=parsed.steps,
        windows=windows,
        warm_up=parsed.warm_up,
        against=against,
        routing=parsed.routing,
        memory=not parsed.no_memory,
        trace=parsed.trace,
        out=parsed.out,
    )
