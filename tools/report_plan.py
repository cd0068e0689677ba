"""Draw the report of a plan, or of a search over layouts: report.html and plots in a folder.

    python tools/report_plan.py out/plan/plan.json [--out DIR]

Reads a file that tools/plan_scale.py wrote. Without --out the page goes beside it. Of a plan it
also writes timeline.json.gz, one step to open in ui.perfetto.dev. Exit status 2 for wrong input.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: tools/profile.py must not stand before the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_mone.common.command_line import OneLineParser, fail
from megatron_mone.reporting.plan.check import read_either
from megatron_mone.reporting.plan.report import write_plan_files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = OneLineParser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="plan.json, or that of a search")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page goes")
    options = parser.parse_args(arguments)
    folder = options.file.parent if options.out is None else options.out
    try:
        path = write_plan_files(read_either(options.file), folder)
    except (ValueError, OSError) as error:
        return fail(error)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
