"""Hold the planner against published runs: predicted and published figures, and their errors.

    python tools/check_published.py          # with the efficiencies in configs/cluster/efficiency
    python tools/check_published.py --fit    # fit those anew, to the runs marked `calibrates`

Reads tests/published/*.yaml (docs/PUBLISHED_RUNS.md), plans every run from the model's own code,
and prints a table: runs the efficiencies were fitted to, runs held out, skewed routing, memory.
Writes it to --out as JSON. Exit status 2 for wrong input.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

if __package__ in (None, ""):  # run as a file: it must not stand before the library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_mone.common.command_line import OneLineParser, fail
from megatron_mone.common.files import write_json

ROOT = Path(__file__).resolve().parents[1]
# Numbers that each cluster's calibration runs can tell apart; of the others nothing is known.
FREE = {"h100-ndr": ("compute", "host_seconds", "overlap_tax"), "b200-ndr": ("compute", "memory")}


def main() -> int:
    """Run the command line."""
    parser = OneLineParser(__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "tests" / "published")
    parser.add_argument("--only", default="", help="runs whose name holds this text")
    parser.add_argument("--fit", action="store_true", help="fit configs/cluster/efficiency anew")
    parser.add_argument("--out", type=Path, default=Path("out/published.json"))
    parsed = parser.parse_args()
    try:
        return _check(parsed.runs, parsed.only, parsed.fit, parsed.out)
    except (ValueError, RuntimeError, OSError) as error:
        return fail(error if isinstance(error, OSError) else ValueError(str(error)))


def _check(folder: Path, only: str, fit: bool, out: Path) -> int:
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.planning.cost.efficiency import efficiency_of
    from megatron_mone.planning.fitting import published
    from megatron_mone.planning.fitting.published_fit import replanned
    from megatron_mone.planning.tracing.trace_server import Tracer

    paths = sorted(path for path in folder.glob("*.yaml") if only in path.stem)
    if not paths:
        raise ValueError(f"--runs {folder} holds no run whose name has {only!r} in it")
    runs = [published.read_published(path) for path in paths]
    rows = []
    with Tracer() as tracer, progress_bar() as say:
        for done, run in enumerate(runs):
            say(done, len(runs), run.name)
            rows.append((run, published.plan_published(run, tracer, efficiency_of(run.cluster))))
    if fit:
        _fit(rows)
        rows = [(run, replanned(planned, efficiency_of(run.cluster))) for run, planned in rows]
    found = [one for run, planned in rows for one in published.compare(run, planned)]
    groups = published.grouped(found)
    for title, comparisons in groups.items():
        print(published.table(title, comparisons))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, published.document(groups))
    print(f"wrote {out}")
    return 0


def _fit(rows: list) -> None:
    from megatron_mone.planning.cost.efficiency import FITTED_ROOT
    from megatron_mone.planning.fitting.published_fit import fit_published

    by_cluster = defaultdict(list)
    for run, planned in rows:
        if run.calibrates and run.routing == "balanced":
            by_cluster[run.cluster].append((run, planned))
    FITTED_ROOT.mkdir(parents=True, exist_ok=True)
    for cluster, chosen in sorted(by_cluster.items()):
        found = fit_published(chosen, FREE[cluster])
        found.efficiency.write(FITTED_ROOT / f"{cluster}.json")
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in found.values.items())
        errors = ", ".join(f"{name} {error:+.1%}" for name, error in found.errors.items())
        print(f"{cluster}: {numbers}\n  {errors}")


if __name__ == "__main__":
    raise SystemExit(main())
