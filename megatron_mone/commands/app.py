"""`megatron-mone`: all commands behind one name."""

from __future__ import annotations

import tomllib
from importlib import metadata
from typing import Annotated

from typer import Exit, Option

from launch.__main__ import program as launch
from megatron_mone.commands import (
    bench,
    check_published,
    compare,
    gather_profiles,
    merge_profile,
    plan,
    prepare,
    profile,
    report_plan,
    report_profile,
    train,
)
from megatron_mone.common.places import ROOT
from megatron_mone.common.program import Program

app = Program("Mixture of Neuron Experts on Megatron-Core.", completes=True)
main = app.main
for _room in (
    *(train, prepare, profile, compare, merge_profile, report_profile, gather_profiles),
    *(plan, report_plan, check_published),
):
    app.add_typer(_room.program)
app.add_typer(bench.program, name="bench")
app.add_typer(launch)


def _print_version(asked: bool) -> None:
    if asked:
        try:
            number = metadata.version("megatron-mone")
        except metadata.PackageNotFoundError:  # a checkout that nothing was installed from
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
            number = project["project"]["version"]
        print(f"megatron-mone {number}")
        raise Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="print it and end")
    ] = False,
) -> None:
    pass
