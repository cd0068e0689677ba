"""`merge-profile`: what the ranks of a profiling job wrote, merged and said in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from megatron_mone.common.program import Program

if TYPE_CHECKING:
    from megatron_mone.profiling.profile_document import Profile, ProfiledRun

_PHASES_SHOWN = 6
_STRAGGLERS_SHOWN = 5
program = Program()
main = program.main


@program.command("merge-profile")
def merge_profile(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="holds ranks/")],
    skip_unreadable: Annotated[
        bool, Option("--skip-unreadable", help="count a rank whose file is cut as missing")
    ] = False,
) -> None:
    """Merge what the ranks of a profiling job wrote into its profile.json, and print the gist.

        megatron-mone merge-profile out/profile [--skip-unreadable]

    Reads FOLDER/ranks/rank-*.json, also of a job that lost ranks. Exit status 2 for wrong input.
    """
    from megatron_mone.common.progress import WHAT, progress_bar
    from megatron_mone.profiling.merge import merge
    from megatron_mone.profiling.profile_document import PROFILE

    files = "rank files"
    with progress_bar(WHAT, "bar", "percent", "left", first=files, transient=True) as bar:
        profile = merge(
            folder,
            skip_unreadable=skip_unreadable,
            on_file=lambda done, total: bar(done, total, files),
        )
    print(summary(profile))
    print(f"written to {folder / PROFILE}")


def summary(profile: Profile) -> str:
    """The ranks there are, then a few lines a run."""
    from megatron_mone.reporting.profile.view import rank_ranges

    ranks = profile.ranks
    lines = [f"ranks          {ranks.present} of {ranks.world_size} on {len(ranks.hosts)} host(s)"]
    for what in ("missing", "incomplete"):
        numbers = getattr(ranks, what)
        if numbers:
            lines.append(f"{what:15}{len(numbers)}: {rank_ranges(numbers, most=len(numbers))}")
    for run in profile.runs:
        lines += ["", *_run_lines(run)]
    return "\n".join(lines)


def _run_lines(run: ProfiledRun) -> list[str]:
    step_ms = run.step_ms
    spread = run.over_ranks["step_ms"]
    lines = [
        f"{run.name} ({run.backend})",
        f"  step         {step_ms:.2f} ms, ranks {spread.min:.2f} (rank {spread.min_rank}) "
        f"to {spread.max:.2f} (rank {spread.max_rank})",
    ]
    biggest = sorted(run.phases.items(), key=lambda item: -item[1])[:_PHASES_SHOWN]
    for phase, ms in biggest:
        lines.append(f"    {phase:24}{ms:10.2f} ms {ms / step_ms:6.1%}")
    if run.neurons:
        lines.append(f"  kept neurons {run.neurons.kept_ratio:.1%}")
    lines.append(f"  expert rows  {run.routing.rows_max_over_mean:.2f} max over mean")
    if run.memory:
        peak = run.memory
        lines.append(
            f"  peak memory  {peak.peak_bytes / 2**20:.1f} MiB on rank {peak.peak_rank}, in "
            f"{peak.peak_phase} {peak.peak_pass}"
        )
    for one in run.stragglers[:_STRAGGLERS_SHOWN]:
        lines.append(
            f"  straggler    rank {one.rank} on {one.host}: computes {one.compute_ms:.2f} "
            f"ms, its stage's median is {one.median_ms:.2f}; mostly {one.phase}"
        )
    more = len(run.stragglers) - _STRAGGLERS_SHOWN
    return lines + ([f"               and {more} more stragglers"] if more > 0 else [])
