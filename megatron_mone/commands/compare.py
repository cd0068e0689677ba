"""`compare`: two profiled runs phase by phase, or a planned job against its profile; fails where
the second got worse, or the plan is off.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from megatron_mone.common.checked_json import load
from megatron_mone.common.files import write_json
from megatron_mone.common.program import Program
from megatron_mone.profiling.compare import PEAK_MEMORY, STEP, Comparison, Row, compare, run_names
from megatron_mone.profiling.profile_document import Profile, path_of

if TYPE_CHECKING:
    from megatron_mone.planning.against_profile import ComparedPart, PlanAgainstProfile

SCHEMA = "megatron-mone/profile-comparison/1"
PLAN, COMPUTE = "plan.json", "compute"
REGRESSION = 3
program = Program()
main = program.main


def _share(text: object) -> float:
    value = float(str(text))
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{text} must be 0 or more, such as 0.05")
    return value


@program.command("compare")
def compare_command(
    run_a: Annotated[
        str, Argument(metavar="RUN_A[:NAME]", help="what is compared against, or a plan")
    ],
    run_b: Annotated[str, Argument(metavar="RUN_B[:NAME]", help="what may have got worse")],
    threshold: Annotated[
        float | None,
        Option(
            parser=_share, help="growth that is a regression (0.05); of a plan: error of a step"
        ),
    ] = None,
    run: Annotated[str | None, Option(metavar="NAME", help="only this run of both")] = None,
    allow_different: Annotated[
        bool, Option("--allow-different", help="compare different models and layouts")
    ] = False,
    json: Annotated[
        Path | None, Option(metavar="OUT", help="also write the comparison here")
    ] = None,
) -> int:
    """Compare two profiled runs phase by phase, or a planned job with its profile, part by part.

        megatron-mone compare out/before out/after [--threshold 0.05] [--run mone] [--json OUT]
        megatron-mone compare out/profile:grouped_mm out/profile:mone
        megatron-mone compare out/plan/plan.json out/profile [--json OUT]

    A run is a profile.json or its folder, with :NAME for one of the runs inside; without a name all
    runs that both have are compared. A plan is a plan.json or its folder, with :NAME for one of its
    models, and the profile must be of the same model, layout and batch. Exit status: 0 no
    regression; 3 the step, a phase of at least 1% of it or the peak memory grew by more than the
    threshold (times only where a 95% confidence interval says that they grew), or the planned step
    is off by more than a threshold that was given; 2 wrong input.
    """
    if _is_plan(run_b):
        raise ValueError(f"{run_b} is a plan: give the plan first and then the profile of its job")
    if _is_plan(run_a):
        return _compare_plan(run_a, run_b, run, threshold, json, allow_different=allow_different)
    threshold = 0.05 if threshold is None else threshold
    found = _compare_all(run_a, run_b, run, threshold, allow_different)
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(json, _document(run_a, run_b, threshold, found))
    for one in found:
        print(table(one))
    worse = [f"{what} of {one.b}" for one in found for what in one.regressions]
    if worse:
        print(f"regression over {threshold:.1%}: {', '.join(worse)}")
        return REGRESSION
    print(f"no regression over {threshold:.1%}")
    return 0


def _is_plan(argument: str) -> bool:
    """Whether a path, with or without :NAME, is a plan's file, or a folder with no profile in it
    but a plan."""
    path, _ = _split(argument)
    if path.is_dir():
        return not path_of(path).exists() and (path / PLAN).exists()
    if not path.is_file():
        return False
    found = load(path, "give the profile.json of tools/profile.py, or a plan.json")
    return isinstance(found, dict) and str(found.get("schema")).startswith("megatron-mone/plan/")


def _compare_plan(
    plan: str,
    profile: str,
    run: str | None,
    threshold: float | None,
    json: Path | None,
    *,
    allow_different: bool,
) -> int:
    from megatron_mone.planning.against_profile import against_profile, read_plan

    (plan_path, model), (profile_path, name) = _split(plan), _split(profile)
    if run and (model or name):
        raise ValueError("--run names the run of both: leave it out, or the :NAME")
    found = against_profile(
        read_plan(plan_path), Profile.read_folder(profile_path), model or run, name or run,
        allow_different=allow_different,
    )  # fmt: skip
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        found.write(json)
    print("\n".join(plan_lines(found)))
    error = found.step_ms.error
    if threshold is None or error is None or abs(error) <= threshold:
        return 0
    print(f"the planned step is off by {error:+.1%}, more than {threshold:.1%}")
    return REGRESSION


def plan_lines(found: "PlanAgainstProfile") -> Iterator[str]:
    """A plan against a profile as lines of text."""
    yield f"planned: {found.model}   measured: {found.run}, {found.routing} routing"
    yield from (
        f"differs: {one.field}: {one.planned!r} in the plan, {one.measured!r} in the profile"
        for one in found.differs
    )
    yield f"{'':30}{'planned':>12}{'measured':>12}{'difference':>12}{'error':>9}"
    yield _plan_line("step, ms", found.step_ms)
    for part in found.parts:
        yield _plan_line(f"  {part.name}", part)
        if part.name == COMPUTE:
            yield from (_plan_line(f"    {one.name}", one) for one in found.phases)
    for one in found.memory_gib:
        name = "peak memory, GiB" if one.name == "peak" else f"  {one.name}, GiB"
        yield _plan_line(name, one, ".3f")
    yield from (f"explains: {words}" for words in found.explained)
    yield f"efficiency: {found.efficiency}"


def _plan_line(name: str, one: "ComparedPart", unit: str = ".1f") -> str:
    error = "" if one.error is None else f"{one.error:+.1%}"
    values = f"{one.planned:12{unit}}{one.measured:12{unit}}{one.difference:+12{unit}}"
    return f"{name:30}{values}{error:>9}"


def _compare_all(
    run_a: str, run_b: str, run: str | None, threshold: float, allow_different: bool
) -> list[Comparison]:
    path_a, name_a = _split(run_a)
    path_b, name_b = _split(run_b)
    if run and (name_a or name_b):
        raise ValueError("--run names the run of both profiles: leave it out, or the :NAME")
    a, b = Profile.read_folder(path_a), Profile.read_folder(path_b)
    name_a = name_a or name_b or run
    pairs = [(name_a, name_b or name_a)] if name_a else _common(a, b)
    same_job = path_of(path_a).resolve() == path_of(path_b).resolve()
    return [
        compare(
            a, b, one, other, threshold=threshold, same_job=same_job,
            allow_different=allow_different,
        )
        for one, other in pairs
    ]  # fmt: skip


def _split(argument: str) -> tuple[Path, str | None]:
    """Path and run name; a path that exists may hold a colon."""
    path, colon, name = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return Path(argument), None
    if not path or not name:
        raise ValueError(f"{argument!r} must be PATH or PATH:NAME")
    return Path(path), name


def _common(a: Profile, b: Profile) -> list[tuple[str, str]]:
    common = [name for name in run_names(a) if name in run_names(b)]
    if not common:
        raise ValueError(
            f"no run name is in both: A has {', '.join(run_names(a))}, B has "
            f"{', '.join(run_names(b))}; name one of each as PATH:NAME"
        )
    return [(name, name) for name in common]


def table(found: Comparison) -> str:
    """A comparison as lines of text."""
    drawn = f"{found.drawn} drawn in pairs" if found.paired else f"{found.drawn} drawn"
    lines = [f"A: {found.a}   B: {found.b}   95% interval of B - A: bootstrap, {drawn}"]
    lines += [f"differs: {field}: {a!r} in A, {b!r} in B" for field, a, b in found.differs]
    lines.append(f"{'':24}{'A':>12}{'B':>12}{'B - A':>12}{'':>9}   95% interval")
    lines += [_line(row) for row in found.rows]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    if row.what == PEAK_MEMORY:
        name, unit, scale = "peak memory, MiB", ".1f", 1 / 2**20
    else:
        name = "step, ms" if row.what == STEP else f"  {row.what}"
        unit, scale = ".3f", 1.0
    a, b = scale * row.a, scale * row.b
    percent = "" if row.ratio is None else f"{row.ratio - 1:+.1%}"
    text = f"{name:24}{a:12{unit}}{b:12{unit}}{b - a:+12{unit}}{percent:>9}"
    if row.lower is not None and row.upper is not None:
        text += f"   [{row.lower:+.3f}, {row.upper:+.3f}]"
    if row.regression:
        text += "  REGRESSION"
    elif row.significant:
        text += "  slower" if row.b > row.a else "  faster"
    return text


def _document(a: str, b: str, threshold: float, found: list[Comparison]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "a": a,
        "b": b,
        "threshold": threshold,
        "comparisons": [asdict(one) | {"regressions": one.regressions} for one in found],
    }
