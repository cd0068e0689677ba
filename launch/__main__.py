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

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.runs.local import INTERRUPTED
from launch.runs.profile_jobs import add_profile_flags, refuse_profile_flags, submit_profile
from launch.runs.run_commands import cancel_run, find_run, resume_run, show_logs, status_lines
from launch.runs.start_commands import is_local, job_of, site_of, start_run, submit_run
from launch.runs.sweep import start_sweep
from launch.runs.sweep_results import show_results
from launch.slurm.commands import SlurmUnavailable
from launch.spec.file import add_flags
from launch.spec.pre_submit import check_before_submit
from megatron_mone.common.command_line import ERROR, OneLineParser, fail
from megatron_mone.common.spelling import nearest_name

NO_ANSWER = 75
"""Exit status where Slurm did not answer: EX_TEMPFAIL of sysexits.h, try again later."""
START = ("run", "submit", "sweep")
LOOK_AFTER = ("status", "logs", "results", "cancel", "resume")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, the ranks' status, or 2 or 75 after one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    own, rest = words[:cut], words[cut + 1 :]
    try:
        if own[:1] and own[0] in LOOK_AFTER:
            return _look_after(parse(run_parser(), own))
        options = parse(start_parser(), own)
        if options.profile:
            submit_profile(options, rest, site_of(options))
            return 0
        refuse_profile_flags(options)
        job = job_of(options, rest)
        if job.points:
            return start_sweep(
                job, options, lambda cases: check_before_submit(cases, options.force)
            )
        if is_local(options):
            return start_run(job, options)
        if not options.dry_run:
            check_before_submit(job, options.force)
        submit_run(job, options)
        return 0
    except (ValueError, OSError) as error:
        return fail(error)
    except SlurmUnavailable as error:
        print(f"{ERROR} {error}", file=sys.stderr)
        return NO_ANSWER
    except KeyboardInterrupt:
        print("launch: interrupted", file=sys.stderr)
        return INTERRUPTED


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The options before `--`; an unknown one ends the program with the nearest known name."""
    options, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        hint = nearest_name(unknown[0].partition("=")[0], flags)
        parser.error(
            f"unknown argument {unknown[0]!r}{hint}; Megatron flags and programs go after --"
        )
    return options


def start_parser() -> argparse.ArgumentParser:
    """The command line of run, submit and sweep, before `--`."""
    parser = _parser()
    parser.add_argument(
        "action", choices=(*START, *LOOK_AFTER), help="ranks here, a Slurm job, all of a grid"
    )
    parser.add_argument("--config", type=Path, help="run file of configs/")
    parser.add_argument("--name", help="of the run and its folder (the run file's)")
    _add_runs(parser)
    parser.add_argument("--launch", help="of configs/launch/, or a path (local; slurm for submit)")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="ARGUMENT=VALUE,VALUE",
        help="a run for each value; may be repeated",
    )  # fmt: skip
    parser.add_argument("--here", action="store_true", help="sweep: on this machine, no Slurm")
    judge = parser.add_mutually_exclusive_group()
    judge.add_argument("--dry-run", action="store_true", help="print the batch script only")
    judge.add_argument("--test-only", action="store_true", help="let Slurm judge, submit nothing")
    parser.add_argument(
        "--force", action="store_true", help="submit also what Megatron or the planner refuses"
    )
    add_profile_flags(parser)
    add_flags(parser)
    return parser


def run_parser() -> argparse.ArgumentParser:
    """The command line of status, logs, results, cancel and resume."""
    parser = _parser()
    parser.add_argument("action", choices=LOOK_AFTER)
    parser.add_argument("names", nargs="*", metavar="RUN", help="a run's name or a job's id")
    _add_runs(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="logs: until interrupted")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__)
    parser.prog = "python -m launch"
    return parser


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (runs)")


def _look_after(options: argparse.Namespace) -> int:
    if options.action == "status":
        lines = status_lines(options.runs, options.names)
        print("\n".join(lines) or f"no run was started in {options.runs}")
        return 0
    if len(options.names) != 1:
        raise ValueError(f"{options.action} takes one run: its name or the id of its job")
    (name,) = options.names
    if options.action == "logs":
        return show_logs(options.runs, name, options.follow)
    if options.action == "results":
        show_results(find_run(options.runs, name)[0])
    elif options.action == "cancel":
        jobs = cancel_run(options.runs, name)
        said = [f"job {job} is cancelled" for job in jobs] or [f"{name} has no job under way"]
        print("\n".join(said))
    else:
        job_id = resume_run(options.runs, name)
        print(f"job {job_id}" if job_id else f"{name}: no case is missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
