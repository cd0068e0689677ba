"""`report-profile`: the page of a profile."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from megatron_mone.common.program import Program

program = Program()
main = program.main


@program.command("report-profile")
def report_profile(
    folders: Annotated[list[Path], Argument(metavar="FOLDER", help="of a profile")],
) -> None:
    """Draw the report of a profile: report.html and plots in its folder.

        megatron-mone report-profile out/profile [out/profile-8 out/profile-16]

    Reads FOLDER/profile.json of each; the report is the first one's, the others (the same model on
    other numbers of ranks) add a scaling curve to it. Exit status 2 for wrong input.
    """
    from megatron_mone.profiling.profile_document import Profile
    from megatron_mone.reporting.profile.check import check_one_model
    from megatron_mone.reporting.profile.report import write_report

    profiles = [Profile.read_folder(folder) for folder in folders]
    check_one_model(profiles, [str(folder) for folder in folders])
    print(f"wrote {write_report(profiles[0], folders[0], profiles[1:])}")
