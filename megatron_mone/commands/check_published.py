"""`check-published`: predicted and published figures, and their errors."""

from collections import defaultdict
from pathlib import Path
from typing import Annotated

from typer import Option

from megatron_mone.common.files import write_json
from megatron_mone.common.places import ROOT
from megatron_mone.common.program import Program

# Numbers that each cluster's calibration runs can tell apart; of the others nothing is known.
FREE = {"h100-ndr": ("compute", "host_seconds", "overlap_tax"), "b200-ndr": ("compute", "memory")}
program = Program()
main = program.main


@program.command("check-published")
def check_published(
    runs: Annotated[Path, Option(help="folder of runs")] = ROOT / "tests" / "published",
    only: Annotated[str, Option(help="runs whose name holds this text")] = "",
    fit: Annotated[bool, Option("--fit", help="fit configs/cluster/efficiency anew")] = False,
    out: Annotated[Path, Option(help="file to write")] = Path("out/published.json"),
) -> None:
    """Hold the planner against published runs: predicted and published figures, and their errors.

        megatron-mone check-published        # with the efficiencies in configs/cluster/efficiency
        megatron-mone check-published --fit  # fit those anew, to the runs marked `calibrates`

    Reads tests/published/*.yaml (docs/PUBLISHED_RUNS.md), plans every run from the model's own
    code, and prints a table: runs the efficiencies were fitted to, runs held out, skewed routing,
    memory; by device the spread of errors around their mean, by model how well the order of layouts
    is kept, and what other planners say of the same runs. Writes the table to --out as JSON. Exit
    status 2 for wrong input.
    """
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.planning.cost.efficiency import efficiency_of
    from megatron_mone.planning.fitting import agreement, published
    from megatron_mone.planning.fitting.published_fit import replanned
    from megatron_mone.planning.tracing.trace_server import Tracer

    paths = sorted(path for path in runs.glob("*.yaml") if only in path.stem)
    if not paths:
        named = f" whose name has {only!r} in it" if only else ""
        raise ValueError(f"--runs {runs} holds no run{named}: give tests/published of a checkout")
    read = [published.read_published(path) for path in paths]
    rows = []
    try:
        with Tracer() as tracer, progress_bar() as say:
            for done, run in enumerate(read):
                say(done, len(read), run.name)
                found = published.plan_published(run, tracer, efficiency_of(run.cluster))
                rows.append((run, found))
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if fit:
        _fit(rows)
        rows = [(run, replanned(planned, efficiency_of(run.cluster))) for run, planned in rows]
    compared = [one for run, planned in rows for one in published.compare(run, planned)]
    groups = published.grouped(compared)
    for title, comparisons in groups.items():
        print(published.table(title, comparisons))
    print(agreement.report(compared))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, published.document(groups))
    print(f"wrote {out}")


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
