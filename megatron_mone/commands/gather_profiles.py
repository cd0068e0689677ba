"""`gather-profiles`: a report over the profiles that `submit --profile` left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from megatron_mone.common.command_line import ERROR
from megatron_mone.common.local_ranks import error_line
from megatron_mone.common.program import Program

if TYPE_CHECKING:
    from megatron_mone.profiling.profile_document import Profile

_LOGS_READ = 16
program = Program()
main = program.main


@program.command("gather-profiles")
def gather_profiles(
    run: Annotated[Path, Argument(metavar="RUN", help="folder of the run")],
    nodes: Annotated[str, Option(help="numbers of nodes that are expected: 1,2,4")] = "",
) -> None:
    """Report over the profiles of several numbers of nodes, as `submit --profile` leaves them.

        megatron-mone gather-profiles runs/NAME [--nodes 1,2,4]

    Merges the rank files of each RUN/profiles/NNN-nodes that has any, also where ranks are missing,
    and writes RUN/profiles/report/report.html: the report of the largest with the scaling curve
    over all. A number of nodes without a profile is named with the reason that its job left. Exit
    status: 0; 2 where there is nothing to report, said in one line.
    """
    print(f"wrote {gather(run, _names(nodes))}")


def gather(run: Path, expected: Sequence[str] = ()) -> Path:
    """Merge the profiles of a run and write the report over them; what is missing goes to stdout.

    Args:
        run: its folder.
        expected: names of folders of RUN/profiles; others that are there count too.

    Returns:
        The page's path.

    Raises:
        ValueError: there is no profile, or they are of different models; one line.
    """
    from megatron_mone.profiling.merge import merge
    from megatron_mone.reporting.profile.check import check_one_model
    from megatron_mone.reporting.profile.report import write_report

    here = [path.name for path in (run / "profiles").glob("*-nodes")]
    found: list[tuple[str, Profile]] = []
    for name in sorted({*expected, *here}):
        try:
            profile = merge(run / "profiles" / name, skip_unreadable=True)
        except (ValueError, OSError) as error:
            print(f"{name}: missing: {why_missing(run / 'cases' / name, error)}")
            continue
        ranks = profile.ranks
        gone = ranks.world_size - ranks.present + len(ranks.incomplete)
        note = f", {gone} of them missing or incomplete" if gone else ""
        print(f"{name}: {ranks.world_size} ranks{note}")
        found.append((name, profile))
    if not found:
        raise ValueError(f"{run / 'profiles'} has no profile: no job left a rank's file")
    found.sort(key=lambda one: -one[1].ranks.world_size)
    names, profiles = zip(*found, strict=True)
    check_one_model(profiles, names)
    return write_report(profiles[0], run / "profiles" / "report", profiles[1:])


def why_missing(case: Path, error: ValueError | OSError) -> str:
    """How the job of one number of nodes ended, from what it left in its folder.

    Args:
        case: that folder.
        error: what is wrong with its profile, which tells where the job ended well.
    """
    from launch.runs.run_manifest import attempts

    tried = attempts(case)
    if not tried:
        return "its job never began"
    last = tried[-1]
    if last["status"] == 0:
        return str(error)
    logs = sorted((case / "logs" / last["attempt"]).glob("rank-*.log"))[:_LOGS_READ]
    said = error_line(logs).removeprefix(ERROR).strip()
    return f"{last['reason'] or 'its job was killed'}{said and f': {said}'}"


def _names(text: str) -> list[str]:
    words = [word for word in text.split(",") if word]
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise ValueError(f"--nodes {text!r} must be numbers of nodes, like 1,2,4")
    return [f"{int(word):03d}-nodes" for word in words]
