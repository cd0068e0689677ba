"""`check-published`: predicted and published figures, and their errors."""

from collections import defaultdict
from math import log1p
from pathlib import Path
from typing import Annotated

from typer import Option

from megatron_mone.common.files import write_json
from megatron_mone.common.places import ROOT
from megatron_mone.common.program import Program

# Numbers that each cluster's calibration runs can tell apart; of the others nothing is known.
FREE = {
    "h100-ndr": ("compute", "function_seconds", "overlap_tax"),
    "b200-ndr": ("compute", "function_seconds"),
    "gb200-nvl72": ("compute",),
}
# Clusters whose kernels nobody published in this form -> those whose kernels' shares they take.
KERNELS_OF = {"gb200-nvl72": "b200-ndr"}
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
        megatron-mone check-published --fit  # fit those anew, to the runs marked `calibrates`,
                                             # and plan no other run

    Reads tests/published/*.yaml (docs/PUBLISHED_RUNS.md), plans every run from the model's own
    code, and prints a table: runs the efficiencies were fitted to, runs held out, skewed routing,
    memory; by device the spread of errors around their mean, by model how well the order of layouts
    is kept, and what other planners say of the same runs. Writes the table to --out as JSON. Exit
    status 2 for wrong input.
    """
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.planning.cost.efficiency import Efficiency, efficiency_of
    from megatron_mone.planning.fitting import agreement, published
    from megatron_mone.planning.fitting.published_fit import replanned
    from megatron_mone.planning.tracing.trace_server import Tracer

    paths = sorted(path for path in runs.glob("*.yaml") if only in path.stem)
    if not paths:
        named = f" whose name has {only!r} in it" if only else ""
        raise ValueError(f"--runs {runs} holds no run{named}: give tests/published of a checkout")
    read = [published.read_published(path) for path in paths]
    if fit:
        read = [run for run in read if run.calibrates]
    rows = []
    try:
        with Tracer() as tracer, progress_bar() as say:
            for done, run in enumerate(read):
                say(done, len(read), run.name)
                known = Efficiency() if fit else efficiency_of(run.cluster)
                found = published.plan_published(run, tracer, known)
                rows.append((run, found))
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if fit:
        _fit(rows, runs / "kernels")
        rows = [(run, replanned(planned, efficiency_of(run.cluster))) for run, planned in rows]
    compared = [one for run, planned in rows for one in published.compare(run, planned)]
    groups = published.grouped(compared)
    for title, comparisons in groups.items():
        print(published.table(title, comparisons))
    print(agreement.report(compared))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, published.document(groups))
    print(f"wrote {out}")


def _fit(rows: list, kernels: Path) -> None:
    """Fit each cluster's efficiency to its runs and kernels, and write its file.

    Args:
        rows: (run, planned) of the runs marked `calibrates`.
        kernels: folder of published times of single kernels.
    """
    from dataclasses import replace

    from megatron_mone.planning.cost.efficiency import FITTED_ROOT
    from megatron_mone.planning.cost.hardware import load_cluster
    from megatron_mone.planning.fitting import published
    from megatron_mone.planning.fitting.kernel_benchmarks import (
        fit_benchmarks,
        read_benchmark,
        spread,
    )
    from megatron_mone.planning.fitting.published_fit import fit_published

    benchmarks = [read_benchmark(path) for path in sorted(kernels.glob("*.json"))]
    curves = {}
    for cluster in sorted({one.cluster for one in benchmarks}):
        own, device = [b for b in benchmarks if b.cluster == cluster], load_cluster(cluster).device
        curves[cluster] = fit_benchmarks(own, device)
        for kind, curve in curves[cluster].items():
            points = [p for b in own for p in b.points if p.operation.kind == kind]
            off = spread(curve, points, device)
            print(f"{cluster}: {kind} of {len(points)} kernels, off by {off:.0%} (rms): {curve}")
    by_cluster = defaultdict(list)
    for run, planned in rows:
        if run.routing == "balanced":
            by_cluster[run.cluster].append((run, planned))
    compared = [one for run, planned in rows for one in published.compare(run, planned)]
    memory = tuple(abs(log1p(one.error)) for one in compared if not one.figure.endswith(" ms"))
    FITTED_ROOT.mkdir(parents=True, exist_ok=True)
    for cluster, chosen in sorted(by_cluster.items()):
        known = curves.get(KERNELS_OF.get(cluster, cluster))
        found = fit_published(chosen, FREE[cluster], known)
        efficiency = replace(found.efficiency, memory_errors=memory)
        efficiency.write(FITTED_ROOT / f"{cluster}.json")
        numbers = ", ".join(f"{name} {found.values[name]:.3g}" for name in FREE[cluster])
        print(f"{cluster}: {numbers}")
        for name, error in found.errors.items():
            print(f"  {name:38} {error:+.1%}")
    for one in compared:
        if not one.figure.endswith(" ms"):
            print(f"{one.run.name:38} {one.figure:22} {one.error:+.1%}")
