"""`megatron-mone`: all commands behind one name."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Exit, Option

from launch.__main__ import program as launch
from megatron_mone.commands import (
    bench,
    calibrate_nodes,
    check_published,
    compare,
    convert,
    doctor,
    evaluate,
    export_load,
    gather_profiles,
    generate,
    gpu_answer,
    inspect,
    losses,
    merge_profile,
    plan,
    prepare,
    profile,
    report_plan,
    report_profile,
    study,
    train,
)
from megatron_mone.common.installed import NAME, own
from megatron_mone.common.program import Program

# A shell completes a command by its name, which `python -m megatron_mone` has not.
_NAMED = Path(sys.argv[0]).name != "__main__.py"
app = Program("Mixture of Neuron Experts on Megatron-Core.", completes=_NAMED)
main = app.main
for _room in (
    *(train, prepare, profile, compare, merge_profile, report_profile, gather_profiles, doctor),
    *(
        plan,
        calibrate_nodes,
        report_plan,
        check_published,
        inspect,
        generate,
        evaluate,
        losses,
        study,
    ),
    *(export_load, gpu_answer),
):
    app.add_typer(_room.program)
app.add_typer(bench.program, name="bench")
app.add_typer(convert.program, name="convert")
app.add_typer(launch)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"{NAME} {own()[0]}")
        raise Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="print it and end")
    ] = False,
) -> None:
    pass
