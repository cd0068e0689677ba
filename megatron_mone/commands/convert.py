"""`convert`: the weights of a Hugging Face folder into a checkpoint, and back."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from megatron_mone.common.program import Program

if TYPE_CHECKING:
    from megatron_mone.conversion.convert import Step

program = Program("Weights of Hugging Face folders into torch_dist checkpoints, and back.")
main = program.main

_Source = Annotated[Path, Argument(metavar="FOLDER", help="of a Hugging Face model")]
_Out = Annotated[Path, Option(metavar="FOLDER", help="to make; must not be there")]


@program.command("import")
def import_(
    source: _Source,
    out: _Out,
    mone: Annotated[
        str | None, Option(metavar="NAME", help="of configs/mone, what makes it a MoNE model")
    ] = None,
    differs: Annotated[
        bool, Option("--differs", help="also where Megatron computes something else of the model")
    ] = False,
) -> None:
    """Write a Hugging Face folder as a checkpoint for --load, in any layout.

        megatron-mone convert import Qwen3-30B-A3B --out checkpoints/qwen3 [--mone quarter]

    One tensor is in memory at a time, of experts a layer's. Stopped, it goes on where it was.
    model.yaml in the new folder is the model of a run file. Exit status 2 for wrong input.
    """
    from megatron_mone.conversion.convert import import_model

    with _bar() as step:
        said = import_model(source, out, step, mone=mone, differs=differs)
    print(
        *said, f"wrote {out}: megatron-mone train --load {out}, model: {out}/model.yaml", sep="\n"
    )


@program.command("export")
def export(
    checkpoint: Annotated[
        Path, Argument(metavar="CHECKPOINT", help="folder of --save, or an iteration in it")
    ],
    out: _Out,
    like: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="Hugging Face model of this shape (the one imported)"),
    ] = None,
    mone: Annotated[
        bool, Option("--mone", help="as our own class, which chooses neurons (trust_remote_code)")
    ] = False,
) -> None:
    """Write a checkpoint, of any layout, as a Hugging Face folder.

        megatron-mone convert export checkpoints/qwen3 --out Qwen3-mine [--like Qwen3-30B-A3B]
        megatron-mone convert export runs/mine/checkpoints --out mine [--mone]

    The names and config.json are those of the folder that was imported, or of --like. A checkpoint
    that was not imported, or --mone, becomes a MoNE model by its own arguments, with the code that
    runs it: megatron-mone generate --model mine. Every tensor of the model must have its place
    there. Exit status 2 for wrong input.
    """
    if mone and like is not None:
        raise ValueError(
            f"--like {like}: a MoNE model is written by the checkpoint's own arguments"
        )
    from megatron_mone.conversion.convert import export_model

    with _bar() as step:
        written = export_model(checkpoint, out, step, like=like, mone=mone)
    print(f"wrote {out}: {len(written)} tensors")


@program.command("roundtrip")
def roundtrip(source: _Source) -> None:
    """Import a Hugging Face folder, export it, and compare every tensor's bytes.

        megatron-mone convert roundtrip Qwen3-30B-A3B

    Needs twice the folder's size in the folder for temporary files. Exit status 2 for a difference.
    """
    from megatron_mone.conversion.convert import round_trip

    with tempfile.TemporaryDirectory() as scratch, _bar() as step:
        equal = round_trip(source, Path(scratch), step)
    print(f"{source}: {equal} tensors came back as they were, bit for bit")


@contextmanager
def _bar() -> "Iterator[Step]":
    from megatron_mone.common.progress import progress_bar

    with progress_bar() as bar:
        yield lambda done, total, what: bar(done >> 20, total >> 20, f"{what}, MiB")
