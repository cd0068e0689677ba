"""Compare two profiled runs phase by phase, and fail where the second one got worse.

    python tools/compare.py out/before out/after [--threshold 0.05] [--run mone] [--json OUT]
    python tools/compare.py out/profile:grouped_mm out/profile:mone

A run is a profile.json or its folder, with :NAME for one of the runs inside; without a name all
runs that both have are compared. Exit status: 0 no regression; 3 the step, a phase of at least 1%
of it or the peak memory grew by more than the threshold (times only where a 95% confidence interval
says that they grew); 2 wrong input.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: tools/profile.py must not stand before the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_mone.common.command_line import OneLineParser, fail
from megatron_mone.common.files import write_json
from megatron_mone.profiling.compare import (
    PEAK_MEMORY,
    STEP,
    Comparison,
    Row,
    compare,
    profile_path,
    read_profile,
    run_names,
)

SCHEMA = "megatron-mone/profile-comparison/1"
REGRESSION = 3


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(__doc__)
    add = parser.add_argument
    add("run_a", metavar="RUN_A[:NAME]", help="what is compared against")
    add("run_b", metavar="RUN_B[:NAME]", help="what may have got worse")
    add("--threshold", type=_share, default=0.05, help="growth that is a regression (0.05)")
    add("--run", metavar="NAME", help="compare only this run of both profiles")
    add("--allow-different", action="store_true", help="compare different models and layouts")
    add("--json", type=Path, metavar="OUT", help="also write the comparison here")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more, such as 0.05")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = build_parser().parse_args(arguments)
    try:
        found = _compare_all(options)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.json, _document(options, found))
    except (ValueError, OSError) as error:
        return fail(error)
    for one in found:
        print(table(one))
    worse = [f"{what} of {one.b}" for one in found for what in one.regressions]
    if worse:
        print(f"regression over {options.threshold:.1%}: {', '.join(worse)}")
        return REGRESSION
    print(f"no regression over {options.threshold:.1%}")
    return 0


def _compare_all(options: argparse.Namespace) -> list[Comparison]:
    path_a, name_a = _split(options.run_a)
    path_b, name_b = _split(options.run_b)
    if options.run and (name_a or name_b):
        raise ValueError("--run names the run of both profiles: leave it out, or the :NAME")
    a, b = read_profile(path_a), read_profile(path_b)
    name_a = name_a or name_b or options.run
    name_b = name_b or name_a
    pairs = [(name_a, name_b)] if name_a else _common(a, b)
    return [
        compare(
            a,
            b,
            one,
            other,
            threshold=options.threshold,
            same_job=profile_path(path_a).resolve() == profile_path(path_b).resolve(),
            allow_different=options.allow_different,
        )
        for one, other in pairs
    ]


def _split(argument: str) -> tuple[Path, str | None]:
    """Path and run name; a path that exists may hold a colon."""
    path, colon, name = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return Path(argument), None
    if not path or not name:
        raise ValueError(f"{argument!r} must be PATH or PATH:NAME")
    return Path(path), name


def _common(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str]]:
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


def _document(options: argparse.Namespace, found: list[Comparison]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "a": options.run_a,
        "b": options.run_b,
        "threshold": options.threshold,
        "comparisons": [asdict(one) | {"regressions": one.regressions} for one in found],
    }


if __name__ == "__main__":
    sys.exit(main())
