"""`calibrate`: times of a job's operators and collectives on its own nodes, as an efficiency."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from megatron_mone.common.local_ranks import run_ranks, terminal
from megatron_mone.common.places import program_words
from megatron_mone.common.program import WORDS, Program
from megatron_mone.common.surroundings import without_ranks

EFFICIENCY = "efficiency.json"
_WAIT = 1800.0
"""Seconds that ranks wait for the first, which may trace the job."""
program = Program()
main = program.main


@dataclass(frozen=True)
class Asked:
    """The options as typed."""

    model: Annotated[str | None, Option(help="of configs/model/, or a YAML file")] = None
    config: Annotated[
        Path | None, Option(help="a whole run file, or its name, instead of --model and --train")
    ] = None
    gpus: Annotated[int | None, Option(help="devices of the job, W")] = None
    layout: Annotated[str | None, Option(help="as plan takes it")] = None
    train: Annotated[str, Option(help="of configs/train/, or a YAML file")] = "plan-4k"
    flags: Annotated[str, Option(help="of configs/cluster/, or a YAML file")] = "gpu"
    cluster: Annotated[str, Option(help="of configs/cluster/hardware/, or a YAML file")] = (
        "h100-ndr"
    )
    seconds: Annotated[float, Option(help="of all sections; each has its share")] = 570.0
    row_seconds: Annotated[
        float, Option(help="of one row on CPU ranks; more where others use the machine")
    ] = 0.02
    out: Annotated[Path, Option(help="folder; what is in it already is not timed again")] = Path(
        "out/calibrate"
    )
    prepare: Annotated[bool, Option("--prepare", help="only trace the job and write work.json")] = (
        False
    )
    prepared: Annotated[
        bool, Option("--prepared", help="take work.json as --prepare left it, trace nothing")
    ] = False


@program.command("calibrate")
def calibrate(
    context: Context,
    asked: Asked,
    ranks: Annotated[
        int, Option(help="ranks to start on this machine; with --prepare, that will time it")
    ] = 1,
) -> int:
    """Time a job's operators and collectives on its own nodes: an efficiency file for plan.

        megatron-mone calibrate --config RUN.yaml --gpus 2 --cluster MINE.yaml --ranks 2
        megatron-mone submit --nodes 2 --gpus-per-node 8 --time-limit 0:30:00 -- \\
            megatron-mone calibrate --config RUN.yaml --gpus 1024 --out out/calibrate
        megatron-mone plan --config RUN.yaml --gpus 1024 --efficiency out/calibrate/efficiency.json

    The job is traced (with --prepare, on a machine without devices), and what it consists of is
    timed, the most expensive first: products, attention, experts, collectives over groups that sit
    as the layout's do; then a few of its layers in its own layout, as far as the ranks hold it, for
    what phases and collectives take in a step. Started by torchrun or srun
    (WORLD_SIZE is set) it is one rank; else it starts --ranks of them here. The same command goes
    on where it was stopped. Writes OUT/work.json, times.json, efficiency.json, report.html and
    plots (docs/PLANNER.md). Not run on a GPU. Exit status: 0; 2 after a wrong input, said in one
    line.
    """
    if asked.prepare and asked.prepared:
        raise ValueError("--prepare writes work.json, --prepared takes it as it is: give one")
    if not 0 < asked.seconds < 1e6:
        raise ValueError(f"--seconds {asked.seconds:g} is not allowed: it must be above 0")
    if not 0 < asked.row_seconds < asked.seconds:
        raise ValueError(
            f"--row-seconds {asked.row_seconds:g} is not allowed: it must be above 0 and below "
            f"--seconds {asked.seconds:g}"
        )
    if ranks < 1:
        raise ValueError(f"--ranks {ranks} is not allowed: give at least 1")
    if "WORLD_SIZE" in os.environ and not asked.prepare:
        return _rank(asked, context.meta[WORDS])
    if not asked.prepared:
        prepare(asked, ranks)
    if asked.prepare:
        return 0
    one = [sys.executable, *program_words("calibrate"), *context.meta[WORDS], "--prepared"]
    return run_ranks(one, ranks, asked.out / "logs")


def prepare(asked: Asked, ranks: int) -> None:
    """Trace the job and write work.json; what times.json holds must be of the same job.

    Args:
        asked: the options.
        ranks: that are to time it.

    Raises:
        ValueError: one line; a wrong input, or another job's files in the folder.
    """
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.planning.fitting.node_times import TIMES, WORK, Times, check_same_job
    from megatron_mone.planning.fitting.node_work import work_of
    from megatron_mone.planning.planner import Planner
    from megatron_mone.planning.question import Asked as Plan
    from megatron_mone.planning.question import read_question
    from megatron_mone.planning.tracing.trace_server import Tracer

    question = read_question(Plan(
        model=asked.model, config=asked.config, gpus=asked.gpus, layout=asked.layout,
        train=asked.train, flags=asked.flags, cluster=asked.cluster,
    ))  # fmt: skip
    earlier = asked.out / TIMES
    known = Times.read(earlier, "give another --out").job if earlier.exists() else None
    try:
        with Tracer() as tracer, progress_bar() as say:
            planner = Planner(tracer, question.cluster, question.efficiency)
            planned = planner.plan(
                question.job, question.gpus, lambda done, of: say(done, of, "traces")
            )
            work = work_of(planner, planned, question.gpus, ranks)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if known is not None:
        check_same_job(earlier, known, work.job)
    asked.out.mkdir(parents=True, exist_ok=True)
    work.write(asked.out / WORK)


def _rank(asked: Asked, words: list[str]) -> int:
    from megatron_mone.planning.fitting.node_times import WORK

    first = os.environ.get("RANK", "0") == "0"
    if first and not asked.prepared:
        here = ["--ranks", os.environ["WORLD_SIZE"]]
        command = [sys.executable, *program_words("calibrate"), *words, *here, "--prepare"]
        done = subprocess.run(command, env=without_ranks(os.environ), check=False)
        if done.returncode:
            return done.returncode
    from megatron_mone.benchmarking.node_times.ranks import Calibration, begin_ranks
    from megatron_mone.planning.cost.hardware import load_cluster
    from megatron_mone.planning.fitting.measured_profile import check_device_name
    from megatron_mone.planning.fitting.node_times import Work

    begin_ranks(_WAIT)
    out = terminal()
    work = Work.read(asked.out / WORK, "run calibrate --prepare where ranks can read it")
    calibration = Calibration(
        work,
        asked.out,
        asked.seconds,
        asked.row_seconds,
        lambda line: print(line, file=out, flush=True),
    )
    check_device_name(asked.out, calibration.device_name, load_cluster(asked.cluster))
    times = calibration.run()
    if first:
        _finish(asked, work, times)
    return 0


def _finish(asked: Asked, work: Any, times: Any) -> None:
    """Fit, write the efficiency and the page, print the lines."""
    from megatron_mone.planning.cost.hardware import load_cluster
    from megatron_mone.planning.fitting.node_fit import fit_nodes
    from megatron_mone.reporting.plan.node_page import lines, write_page

    found = fit_nodes(work, times, load_cluster(asked.cluster))
    found.efficiency.write(asked.out / EFFICIENCY)
    page = write_page(found, asked.out)
    print(lines(found), file=terminal())
    print(f"wrote {asked.out / EFFICIENCY} and {page}", file=terminal(), flush=True)
