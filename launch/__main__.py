"""Start runs here or through Slurm, and look after them.

    python -m launch run    --config configs/demo-mone.yaml [FLAGS] [-- MEGATRON FLAGS]
    python -m launch submit --config configs/plan/moe-30b-a3b-mone-128.yaml --nodes 16
    python -m launch submit --config configs/plan/moe-30b-a3b-mone-128.yaml --nodes 16 --profile
    python -m launch submit --launch my-cluster.yaml --nodes 2 -- PROGRAM ARGUMENTS
    python -m launch sweep  --config configs/demo-mone.yaml --grid r=1/2,1/4,1/8 [--here]
    python -m launch status [RUN ...]
    python -m launch logs RUN [-f]      and: results RUN, cancel RUN, resume RUN

RUN is a run's name or a job's id. docs/LAUNCH.md has the fields of a launch file.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Context, Option

from launch.runs.local import INTERRUPTED
from launch.runs.profile_jobs import ProfileFlags, refuse_profile_flags, submit_profile
from launch.runs.run_commands import cancel_run, find_run, resume_run, show_logs, status_lines
from launch.runs.start_commands import is_local, job_of, site_of, start_run, submit_run
from launch.runs.sweep import start_sweep
from launch.runs.sweep_results import show_results
from launch.slurm.commands import SlurmUnavailable
from launch.spec.file import SiteFlags
from launch.spec.pre_submit import check_before_submit
from megatron_mone.common.command_line import ERROR
from megatron_mone.common.program import PASSES_REST, Program

NO_ANSWER = 75
"""Exit status where Slurm did not answer: EX_TEMPFAIL of sysexits.h, try again later."""
program = Program(__doc__)
main = program.main

Runs = Annotated[Path, Option("--runs", help="folder of runs")]
Names = Annotated[list[str] | None, Argument(metavar="RUN", help="a run's name or a job's id")]
RUNS = Path("runs")


@dataclass
class StartFlags:
    """What run, submit and sweep take before `--`, beside the fields of a launch file."""

    action: str = field(default="", init=False)
    config: Annotated[Path | None, Option(help="run file, or its name in configs/")] = None
    name: Annotated[str | None, Option(help="of the run and its folder (the run file's)")] = None
    runs: Runs = RUNS
    launch: Annotated[
        str | None, Option(help="of configs/launch/, or a path (local; slurm for submit)")
    ] = None
    grid: Annotated[
        list[str] | None,
        Option(metavar="ARGUMENT=VALUE,VALUE", help="a run for each value; may be repeated"),
    ] = None
    here: Annotated[bool, Option("--here", help="sweep: on this machine, no Slurm")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="print the batch script only")] = False
    test_only: Annotated[bool, Option("--test-only", help="let Slurm judge, submit nothing")] = (
        False
    )
    force: Annotated[
        bool, Option("--force", help="submit also what Megatron or the planner refuses")
    ] = False


@dataclass
class Options(SiteFlags, ProfileFlags, StartFlags):
    """All that run, submit and sweep take."""


def _asks_slurm(command: Callable[..., int | None]) -> Callable[..., int]:
    """A command that ends with NO_ANSWER where Slurm gives none."""

    @wraps(command)
    def asking(*given: Any, **options: Any) -> int:
        try:
            return command(*given, **options) or 0
        except SlurmUnavailable as error:
            print(f"{ERROR} {error}", file=sys.stderr)
            return NO_ANSWER
        except KeyboardInterrupt:
            print("launch: interrupted", file=sys.stderr)
            return INTERRUPTED

    return asking


@program.command("run", context_settings=PASSES_REST)
def run(context: Context, options: Options) -> int:
    """Start the ranks of a run file, or of a program after --, on this machine."""
    return _start("run", options, context.args)


@program.command("submit", context_settings=PASSES_REST)
def submit(context: Context, options: Options) -> int:
    """Hand a run file, or a program after --, to Slurm; the fields of --launch have flags too."""
    return _start("submit", options, context.args)


@program.command("sweep", context_settings=PASSES_REST)
def sweep(context: Context, options: Options) -> int:
    """Run all of a grid, as one Slurm array or here; again: what is missing."""
    return _start("sweep", options, context.args)


@_asks_slurm
def _start(action: str, options: Options, rest: Sequence[str]) -> int:
    if options.dry_run and options.test_only:
        raise BadParameter("argument --test-only: not allowed with argument --dry-run")
    options.action, options.grid = action, options.grid or []
    if options.profile:
        submit_profile(options, rest, site_of(options))
        return 0
    refuse_profile_flags(options)
    job = job_of(options, rest)
    if job.points:
        return start_sweep(job, options, lambda cases: check_before_submit(cases, options.force))
    if is_local(options):
        return start_run(job, options)
    if not options.dry_run:
        check_before_submit(job, options.force)
    submit_run(job, options)
    return 0


def _one(action: str, names: Sequence[str] | None) -> str:
    if names is None or len(names) != 1:
        raise ValueError(f"{action} takes one run: its name or the id of its job")
    return names[0]


@program.command("status")
@_asks_slurm
def status(names: Names = None, runs: Runs = RUNS) -> None:
    """Say how runs stand, all of them or those named."""
    lines = status_lines(runs, names or [])
    print("\n".join(lines) or f"no run was started in {runs}")


@program.command("logs")
@_asks_slurm
def logs(
    names: Names = None,
    runs: Runs = RUNS,
    follow: Annotated[bool, Option("--follow", "-f", help="until interrupted")] = False,
) -> int:
    """Print what a run's ranks and its job said."""
    return show_logs(runs, _one("logs", names), follow)


@program.command("results")
@_asks_slurm
def results(names: Names = None, runs: Runs = RUNS) -> None:
    """Print the table of a run or sweep, and write its page."""
    show_results(find_run(runs, _one("results", names))[0])


@program.command("cancel")
@_asks_slurm
def cancel(names: Names = None, runs: Runs = RUNS) -> None:
    """Take a run's jobs from Slurm."""
    name = _one("cancel", names)
    said = [f"job {job} is cancelled" for job in cancel_run(runs, name)]
    print("\n".join(said or [f"{name} has no job under way"]))


@program.command("resume")
@_asks_slurm
def resume(names: Names = None, runs: Runs = RUNS) -> None:
    """Submit a run again, from its last checkpoint; of a sweep, the cases that are missing."""
    name = _one("resume", names)
    job_id = resume_run(runs, name)
    print(f"job {job_id}" if job_id else f"{name}: no case is missing")


if __name__ == "__main__":
    sys.exit(main())
