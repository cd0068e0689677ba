"""`losses`: what keeping fewer neurons costs a checkpoint on a text, layer by layer."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from megatron_mone.common.program import Program

program = Program()
main = program.main
FILE = "losses.json"


@program.command("losses")
def losses(
    checkpoint: Annotated[
        Path, Argument(metavar="CHECKPOINT", help="folder of --save, or what convert wrote")
    ],
    text: Annotated[Path, Option(metavar="FILE", help="UTF-8")],
    out: Annotated[Path, Option(metavar="FOLDER", help="of the results")],
    ratios: Annotated[
        str, Option(metavar="R,...", help="shares of an expert's neurons; none for the loss alone")
    ] = "1/2,1/4,1/8",
    tokens: Annotated[int, Option(metavar="N", help="of the text, at most", min=1)] = 2048,
    length: Annotated[int, Option(metavar="N", help="tokens that see each other", min=1)] = 256,
) -> None:
    """Measure a text's loss, as it is and with fewer neurons kept in all layers and in each.

        megatron-mone losses checkpoints/qwen3 --text book.txt --out out/losses
        megatron-mone losses out/run --text book.txt --ratios none --out out/losses

    In this process, on one rank; the weights are as they are. Stopped, the same command goes on.
    Writes OUT/losses.json and, of several layers, losses.png and .svg. Exit status 2 for wrong
    input.
    """
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.evaluation.ratio_losses import measure

    shares = [] if ratios == "none" else [_share(word) for word in ratios.split(",")]
    with progress_bar(first="loading") as bar:
        document = measure(
            checkpoint, text, shares, out / FILE, bar, tokens=tokens, length=length
        )  # fmt: skip
    if document["ratios"]:
        from megatron_mone.reporting.ratio_losses import draw

        draw(document, out / "losses")
    print(table(document), f"wrote {out / FILE}", sep="\n")


def _share(word: str) -> Fraction:
    try:
        return Fraction(word)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--ratios {word}: give shares such as 1/2,1/4 or 0.5") from None


def table(document: dict[str, Any]) -> str:
    """The document as text: a line a layer."""
    found, ratios = document["losses"], document["ratios"]
    whole = found["as it is"]
    lines = [f"loss of {document['measured']['tokens']:,} tokens: {whole:.4f} nats a token"]
    if ratios:
        lines.append("grows by".ljust(12) + "".join(f"{f'r = {one}':>12}" for one in ratios))
    for where in [*(f"layer {n}" for n in document["layers"]), "all layers"] if ratios else []:
        grows = "".join(f"{found[f'{one} in {where}'] - whole:12.4f}" for one in ratios)
        lines.append(where.ljust(12) + grows)
    return "\n".join(lines)
