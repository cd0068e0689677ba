"""`convert`: the weights of a Hugging Face folder into a checkpoint, and back."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from megatron_mone.common.program import Program

if TYPE_CHECKING:
    from megatron_mone.conversion.folders import Step


class Split(StrEnum):
    """How neurons are divided among experts."""

    random = "random"
    coactivation = "coactivation"


program = Program("Weights of Hugging Face folders into torch_dist checkpoints, and back.")
main = program.main

_BYTES = ("import", "export")
_Source = Annotated[Path, Argument(metavar="FOLDER", help="of a Hugging Face model")]
_Mone = Annotated[
    str | None, Option(metavar="NAME", help="of configs/mone, what makes it a MoNE model")
]
_Differs = Annotated[
    bool, Option("--differs", help="also where Megatron computes something else of the model")
]
_Experts = Annotated[int, Option(metavar="E", help="experts of a layer")]
_Topk = Annotated[int, Option(metavar="K", help="experts of a token")]
_Seed = Annotated[int, Option(metavar="N", help="of what is drawn")]
_Out = Annotated[Path, Option(metavar="FOLDER", help="to make; must not be there")]


@program.command("import")
def import_(
    source: _Source,
    out: _Out,
    mone: _Mone = None,
    differs: _Differs = False,
) -> None:
    """Write a Hugging Face folder as a checkpoint for any layout.

        megatron-mone convert import Qwen3-30B-A3B --out checkpoints/qwen3 [--mone quarter]

    One tensor is in memory at a time, of experts a layer's. Stopped, it goes on where it was.
    model.yaml in the new folder is the model of a run file. Exit status 2 for wrong input.
    """
    from megatron_mone.conversion.importing import import_model

    with _bar() as step:
        said = import_model(source, out, step, mone=mone, differs=differs)
    _wrote(out, said)


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
    from megatron_mone.conversion.exporting import export_model

    with _bar() as step:
        written = export_model(checkpoint, out, step, like=like, mone=mone)
    print(f"wrote {out}: {len(written)} tensors")


@program.command("roundtrip")
def roundtrip(source: _Source) -> None:
    """Import a Hugging Face folder, export it, and compare every tensor's bytes.

        megatron-mone convert roundtrip Qwen3-30B-A3B

    Needs twice the folder's size in the folder for temporary files. Exit status 2 for a difference.
    """
    from megatron_mone.conversion.exporting import round_trip

    with tempfile.TemporaryDirectory() as scratch, _bar() as step:
        equal = round_trip(source, Path(scratch), step)
    print(f"{source}: {equal} tensors came back as they were, bit for bit")


@program.command("carve")
def carve(
    source: _Source,
    out: _Out,
    experts: _Experts,
    topk: _Topk,
    shared_neurons: Annotated[
        int, Option(metavar="N", help="of an expert that every token passes")
    ] = 0,
    by: Annotated[Split, Option(help="which neurons go together")] = Split.random,
    text: Annotated[
        Path | None, Option(metavar="FILE", help="the model is run on, to choose and to measure")
    ] = None,
    tokens: Annotated[int, Option(metavar="N", help="of the text, at most", min=512)] = 4096,
    mone: _Mone = None,
    seed: _Seed = 1,
    differs: _Differs = False,
) -> None:
    """Divide a dense model's FFNs into experts.

        megatron-mone convert carve SmolLM2-135M --out carved --experts 8 --topk 8
        megatron-mone convert carve SmolLM2-135M --out carved --experts 8 --topk 4 \\
            --shared-neurons 512 --by coactivation --text book.txt --mone quarter

    With all experts chosen the output is the dense model's; with fewer, --text fits the routers and
    says what is lost, by layer in the new folder's experts.json. Exit status 2 for wrong input.
    """
    from megatron_mone.conversion import to_experts

    with _bar() as step:
        said = to_experts.carve(
            source, out, step, experts=experts, topk=topk, shared=shared_neurons, by=by.value,
            text=text, tokens=tokens, mone=mone, seed=seed, differs=differs,
        )  # fmt: skip
    _wrote(out, said)


@program.command("upcycle")
def upcycle(
    source: _Source,
    out: _Out,
    experts: _Experts,
    topk: _Topk,
    granularity: Annotated[
        int, Option(metavar="G", help="slices of a copy, routed to together at first", min=1)
    ] = 1,
    redraw: Annotated[
        float, Option(metavar="SHARE", help="of each expert's neurons, that start anew")
    ] = 0.0,
    mone: _Mone = None,
    seed: _Seed = 1,
    differs: _Differs = False,
) -> None:
    """Copy a dense model's FFNs into experts (sparse upcycling).

        megatron-mone convert upcycle Qwen3-0.6B --out more --experts 8 --topk 2 [--redraw 0.5]
        megatron-mone convert upcycle Qwen3-0.6B --out more --experts 64 --topk 8 --granularity 8

    The output is the dense model's, but for what is redrawn. Exit status 2 for wrong input.
    """
    from megatron_mone.conversion import to_experts

    with _bar() as step:
        said = to_experts.upcycle(
            source, out, step, experts=experts, topk=topk, granularity=granularity, redrawn=redraw,
            mone=mone, seed=seed, differs=differs,
        )  # fmt: skip
    _wrote(out, said)


@program.command("merge")
def merge(
    sources: Annotated[list[Path], Argument(metavar="FOLDER...", help="models of one shape")],
    out: _Out,
    topk: _Topk,
    attention: Annotated[
        str, Option(metavar="average|N", help="what is no FFN: the mean, or of the Nth folder")
    ] = "average",
    mone: _Mone = None,
    seed: _Seed = 1,
    differs: _Differs = False,
) -> None:
    """Make the FFNs of several dense models one model's experts (Branch-Train-MiX).

        megatron-mone convert merge code maths prose --out merged --topk 2

    Exit status 2 for wrong input.
    """
    from megatron_mone.conversion import to_experts

    with _bar() as step:
        said = to_experts.merge(
            sources, out, step, topk=topk, attention=attention, mone=mone, seed=seed,
            differs=differs,
        )  # fmt: skip
    _wrote(out, said)


def _wrote(out: Path, said: list[str]) -> None:
    fields = f"model: {out}/model.yaml, pretrained_checkpoint: {out}"
    print(*said, f"wrote {out}; in a run file: {fields}", sep="\n")


@contextmanager
def _bar() -> "Iterator[Step]":
    from megatron_mone.common.progress import progress_bar

    with progress_bar() as bar:

        def told(done: int, total: int, what: str) -> None:
            if what in _BYTES:
                done, total, what = done >> 20, total >> 20, f"{what}, MiB"
            bar(done, total, what)

        yield told
