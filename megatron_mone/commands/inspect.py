"""`inspect`: the shape of a Hugging Face model as a model file."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from megatron_mone.common.program import Program

program = Program()
main = program.main


@program.command("inspect")
def inspect(
    model: Annotated[
        Path, Argument(metavar="MODEL", help="folder of a Hugging Face model, or its config.json")
    ],
    out: Annotated[
        Path | None, Option(metavar="FILE", help="model file to write (printed without it)")
    ] = None,
    mone: Annotated[
        str | None, Option(metavar="NAME", help="of configs/mone, what makes it a MoNE model")
    ] = None,
) -> None:
    """Write a Hugging Face model's shape as Megatron's arguments, a file for `model:` of a run.

        megatron-mone inspect Qwen3-30B-A3B [--out configs/model/mine.yaml] [--mone quarter]

    Needs the config.json alone, and neither torch nor transformers. Fields that the file cannot
    say are told in comments at its top. Exit status 2 for wrong input.
    """
    from megatron_mone.conversion.inspect import model_file, write_model_file

    if out is None:
        print(model_file(model, mone), end="")
    else:
        write_model_file(model, out, mone)
        print(f"wrote {out}")
