"""`report-plan`: the page of a plan, or of a search over layouts."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from megatron_mone.common.program import Program

program = Program()
main = program.main


@program.command("report-plan")
def report_plan(
    file: Annotated[Path, Argument(metavar="FILE", help="plan.json, or that of a search")],
    out: Annotated[Path | None, Option(metavar="DIR", help="where the page goes")] = None,
) -> None:
    """Draw the report of a plan, or of a search over layouts: report.html and plots in a folder.

        megatron-mone report-plan out/plan/plan.json [--out DIR]

    Reads a file that `megatron-mone plan` wrote. Without --out the page goes beside it. Of a plan
    it also writes timeline.json.gz, one step to open in ui.perfetto.dev. Exit status 2 for wrong
    input.
    """
    from megatron_mone.reporting.plan.report import read_either, write_plan_files

    folder = file.parent if out is None else out
    print(f"wrote {write_plan_files(read_either(file), folder)}")
