"""Draw the report of a profile: report.html and plots in its folder.

    python tools/report_profile.py out/profile [out/profile-8 out/profile-16]

Reads FOLDER/profile.json of each; the report is the first one's, the others (the same model on
other numbers of ranks) add a scaling curve to it. Exit status 2 for wrong input.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: tools/profile.py must not stand before the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_mone.common.command_line import OneLineParser, fail
from megatron_mone.reporting.profile.check import check_one_model, read_profile
from megatron_mone.reporting.profile.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = OneLineParser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a profile")
    folders = parser.parse_args(arguments).folders
    try:
        profiles = [read_profile(folder) for folder in folders]
        check_one_model(profiles, [str(folder) for folder in folders])
        path = write_report(profiles[0], folders[0], profiles[1:])
    except (ValueError, OSError) as error:
        return fail(error)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
