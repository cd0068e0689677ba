"""Before a job waits in a queue: are its flags right, and does it fit the GPUs' memory?

Megatron checks the flags (checked_flags.py), the planner the memory (docs/PLANNER.md).
May touch: the planner's processes and cache; stderr.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.spec.checked_flags import (
    check_data,
    check_flags,
    knows_vocabulary,
    megatron_parser,
    stated_job,
)
from launch.spec.launch_spec import LaunchSpec
from launch.spec.training_job import Job
from megatron_mone.model.run_config import to_flags
from megatron_mone.profiling.baselines import MAIN, RunSpec

if TYPE_CHECKING:
    from megatron_mone.planning.cost.prediction import Prediction
    from megatron_mone.planning.job import JobSpec
    from megatron_mone.planning.planner import Planned, Planner
    from megatron_mone.planning.tracing.trace_server import Tracer

MOST_PLANNED = 8
"""Cases of a grid that are planned: each takes seconds."""
_PACKAGES = ("torch", "megatron", "megatron.training")
_GIB = 2**30
_FORCE = "or submit it all the same with --force"
Say = Callable[[int, int, str], None]


class Refused(ValueError):
    """A job that cannot run as it stands; one line with the fix."""


@dataclass(frozen=True)
class Memory:
    """What the fullest rank needs, of one model or of several in one process.

    Attributes:
        peak: bytes.
        stage: of the pipeline, that the rank is in.
    """

    peak: float
    stage: int


def check_before_submit(job: Job, force: bool) -> None:
    """Say on stderr what is known of a job before it is submitted.

    Args:
        job: checked; one that trains, others pass.
        force: submit also what is refused here.

    Raises:
        ValueError: Megatron refuses its flags, its data are broken, or it cannot fit the GPUs; one
            line with the fix.
    """
    if "values" not in job.config:
        return
    with pre_submit_checks(force) as checks:
        if checks is not None:
            checks.training(job)


@contextmanager
def pre_submit_checks(force: bool) -> Iterator[PreSubmitChecks | None]:
    """The checks, while its processes run; None, and a line, where nothing can be checked.

    Args:
        force: a refusal is printed and ends nothing.

    Raises:
        ValueError: what the checks refuse.
    """
    if missing := _missing_package():
        _note(f"flags and memory are not checked: {missing} is not installed here")
        yield None
        return
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.planning.tracing.trace_cache import TraceCache
    from megatron_mone.planning.tracing.trace_server import Tracer

    try:
        cache = TraceCache()
    except ValueError as error:
        _note(f"flags and memory are not checked: {error} (XDG_CACHE_HOME)")
        yield None
        return
    try:
        with Tracer(cache) as tracer, progress_bar() as say:
            yield PreSubmitChecks(tracer, say)
    except Refused as error:
        if not force:
            raise
        _note(f"megatron-mone: warning: {error}")


def _missing_package() -> str:
    """What Megatron's checks need and this machine has not; a container may bring its own."""
    for name in _PACKAGES:
        if find_spec(name) is None:
            return name
    return ""


class PreSubmitChecks:
    """Asks Megatron and the planner.

    Args:
        tracer: entered.
        say: told (done, of how many, of what).
    """

    def __init__(self, tracer: Tracer, say: Say) -> None:
        self._tracer = tracer
        self._say = say
        self._planners: dict[str, Planner] = {}

    def training(self, job: Job) -> None:
        """Check a training job, or each case of a grid.

        Raises:
            Refused: one line with the fix.
        """
        spec, values, words = job.spec, job.config["values"], job.config["arguments"]
        stated = {
            Path(case.folder).name: self.stated(spec.name, values, [*words, *case.arguments])
            for case in spec.cases
        } or {"": self.stated(spec.name, values, words)}
        planned = []
        for done, (case, one) in enumerate(stated.items()):
            self._say(done, len(stated), "Megatron checks the flags")
            if self.flags(one, spec, case):
                planned.append(case)
        self.data(next(iter(stated.values())), job.data)
        if not self.plans(spec):
            return
        if len(planned) > MOST_PLANNED:
            _note(f"planner: the first {MOST_PLANNED} of {len(planned)} cases are planned")
        for case in planned[:MOST_PLANNED]:
            self.memory({case: stated[case]}, spec, case)

    def stated(self, name: str, values: Mapping[str, Any], words: Sequence[str]) -> JobSpec:
        """`stated_job`, refusing as a check does."""
        with _refusing(""):
            return stated_job(name, values, words)

    def compared(self, job: JobSpec, baselines: Sequence[RunSpec]) -> dict[str, JobSpec]:
        """A model and its baselines, by name; those that DeepSpeed steps are left to their ranks,
        for they are not planned.

        Raises:
            Refused: a baseline that the model has nothing of.
        """
        with _refusing(""):
            stepped = [one for one in baselines if not one.by_deepspeed]
            return {MAIN: job, **{one.name: job.against(one) for one in stepped}}

    def flags(self, job: JobSpec, spec: LaunchSpec, case: str = "") -> bool:
        """Have Megatron check the flags; whether the planner can plan them.

        Raises:
            Refused: one line.
        """
        with _refusing(case):
            try:
                ranks = spec.nodes * spec.ranks_per_node
                description = check_flags(self._tracer, job, ranks, bool(spec.gpus_per_node))
            except RuntimeError as error:
                _note(f"flags and memory are not checked: {error}")
                return False
        if description is None and spec.gpus_per_node:
            _note("planner: no verdict on memory: it does not plan what these flags turn on")
        return description is not None

    def data(self, job: JobSpec, prefixes: Sequence[str]) -> None:
        """Check the datasets that are here, and name the others.

        Raises:
            Refused: one line.
        """
        with _refusing(""):
            for prefix in check_data(job, prefixes):
                _note(f"data {prefix} is not on this machine: not checked")

    def plans(self, spec: LaunchSpec) -> bool:
        """Whether there is memory to checks: of GPUs that the launch file names; says where not."""
        if spec.gpus_per_node and spec.planner_cluster is None:
            _note("planner: no verdict on memory: the launch file names no planner_cluster")
        return spec.gpus_per_node > 0 and spec.planner_cluster is not None

    def memory(self, jobs: Mapping[str, JobSpec], spec: LaunchSpec, case: str = "") -> None:
        """Have the planner check the memory of models that train in one process; says so.

        Args:
            jobs: name -> model, the one under test first.
            spec: with `planner_cluster`.
            case: of a grid, for the line.

        Raises:
            Refused: they cannot fit; one line with the cheapest change by which they do.
        """
        head = f"planner ({spec.planner_cluster})" + (f", {case}" if case else "")
        why = _unplannable(next(iter(jobs.values())))
        if why:
            _note(f"{head}: no verdict on memory: {why}")
            return
        gpus = spec.nodes * spec.ranks_per_node
        planner = self._planner(spec.planner_cluster or "")
        try:
            planned = [
                planner.plan(one, gpus, lambda done, total: self._say(done, total, "planning"))
                for one in jobs.values()
            ]
        except (ValueError, RuntimeError) as error:
            _note(f"{head}: no verdict on memory: {' '.join(str(error).split())}")
            return
        memory = together([one.prediction for one in planned])
        limit = planner.cluster.device.memory_bytes
        said = _said(memory, limit, planned, len(jobs))
        if memory.peak <= limit:
            _note(f"{head}: {said}: fits")
            return
        fix = "use more GPUs, or fewer baselines (--against), "
        if len(planned) == 1:
            fix = self._fix(planner, planned[0], gpus)
        raise Refused(f"{head}: {said}: does not fit; {fix}{_FORCE}")

    def _planner(self, cluster: str) -> Planner:
        from megatron_mone.planning.cost.efficiency import efficiency_of
        from megatron_mone.planning.cost.hardware import load_cluster
        from megatron_mone.planning.planner import Planner

        if cluster not in self._planners:
            try:
                hardware = load_cluster(cluster)
            except ValueError as error:
                raise ValueError(f"planner_cluster = {cluster!r}: {error}") from error
            self._planners[cluster] = Planner(self._tracer, hardware, efficiency_of(hardware.name))
        return self._planners[cluster]

    def _fix(self, planner: Planner, planned: Planned, gpus: int) -> str:
        from megatron_mone.planning.fixes import cheapest_fix

        try:
            found = cheapest_fix(
                planner, planned, gpus, lambda words: self._say(0, 1, f"trying {words}")
            )
        except RuntimeError:
            found = None
        if found is None:
            return "no single change makes it fit: use more GPUs, "
        words, fitting = found
        flags = shlex.join(_changed_flags(planned.job, fitting.job))
        prediction = fitting.prediction
        return (
            f"{words} makes it fit ({prediction.peak / _GIB:.1f} GiB, "
            f"{1e3 * prediction.seconds:,.0f} ms a step): add {flags} after --, "
        )


def together(predictions: Sequence[Prediction]) -> Memory:
    """Memory of models that train in turn in one process.

    Each keeps its weights, gradients and optimizer state; the rest comes and goes with its turn.
    """
    stages = []
    for ranks in zip(*(one.memory_P for one in predictions), strict=True):
        held = [rank.weights + rank.gradients + rank.optimizer for rank in ranks]
        rest = max(rank.peak - own for rank, own in zip(ranks, held, strict=True))
        stages.append(sum(held) + rest)
    stage = max(range(len(stages)), key=stages.__getitem__)
    return Memory(stages[stage], stage)


def _said(memory: Memory, limit: float, planned: Sequence[Planned], models: int) -> str:
    text = f"{memory.peak / _GIB:.1f} of {limit / _GIB:.1f} GiB on the fullest rank"
    text += f" (stage {memory.stage})"
    if models > 1:
        return f"{text} with {models} models in it"
    return f"{text}, {1e3 * planned[0].prediction.seconds:,.0f} ms a step predicted"


def _unplannable(job: JobSpec) -> str:
    """Why no memory of a job is known, or nothing."""
    if job.values().get("transformer_impl") == "local":
        return "transformer_impl = 'local' is planned for CPU ranks only"
    if not knows_vocabulary(job):
        return "the tokenizer is not on this machine; give vocab_size"
    return ""


def _changed_flags(before: JobSpec, after: JobSpec) -> list[str]:
    old, new = before.values(), after.values()
    changed = {name: value for name, value in new.items() if old.get(name) != value}
    return to_flags(changed, megatron_parser(), Path("fix"))


@contextmanager
def _refusing(case: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        where = f"{case}: " if case else ""
        raise Refused(f"{where}{' '.join(str(error).split())}") from error


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
