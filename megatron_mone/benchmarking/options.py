"""The options of a race, as `megatron-mone bench experts` reads them. Imports nothing heavy."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from typer import Option


def _ratio(text: object) -> float:
    try:
        return float(Fraction(str(text)))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number like 0.25 or 1/4") from None


@dataclass
class Asked:
    """The options as typed; any of the first eight asks for one cell."""

    tokens: Annotated[int | None, Option(help="N, routed rows (4096)")] = None
    hidden: Annotated[int | None, Option(help="H (512)")] = None
    neurons: Annotated[int | None, Option(help="F, neurons of one expert (1408)")] = None
    experts: Annotated[int | None, Option(help="E (8)")] = None
    ratio: Annotated[float | None, Option(parser=_ratio, help="r = S / F, 0.25 or 1/4 (0.25)")] = (
        None
    )
    dtype: Annotated[str | None, Option(help="fp32 or bf16 (fp32)")] = None
    routing: Annotated[
        str | None, Option(help="balanced, or skewed as in a recorded run (balanced)")
    ] = None
    json: Annotated[Path | None, Option(help="write the numbers of one cell to this file")] = None
    grid: Annotated[
        Literal["quick", "full"] | None, Option(help="which cells of a grid (quick)")
    ] = None
    out: Annotated[Path | None, Option(help="folder of a grid's report (out/bench)")] = None
    neuron_block: Annotated[int, Option(help="B adjacent neurons chosen together")] = 1
    instructions: Annotated[
        Literal["avx2"] | None,
        Option(help="run this class's vector code, ours and the peers', on a later processor"),
    ] = None
    minutes: Annotated[
        float | None, Option(help="of a grid: stop before a cell that would go beyond; the same "
                             "command goes on")
    ] = None  # fmt: skip
    threads: Annotated[int | None, Option(help="of torch (its own choice)")] = None
    repeats: Annotated[int | None, Option(help="least repeats (4; of the full grid 2)")] = None
    seconds: Annotated[
        float | None, Option(help="for repeats of a cell (5; of the full grid 3)")
    ] = None
