"""Print which backends run on this machine, and which one `auto` takes for a call and why.

    python -m megatron_mone.kernels --tokens 4096 --experts 8 --neurons 1408 --ratio 0.25

With --table-from, write the table of measured times that `auto` looks up, from a benchmark.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from megatron_mone.common.program import Program
from megatron_mone.kernels import BACKENDS, Call, Selection, choose_backend, measured
from megatron_mone.kernels.activations import ACTIVATIONS
from megatron_mone.kernels.race_results import DTYPES

program = Program()


@program.command(help=__doc__)
def backends(
    tokens: Annotated[int, Option(help="N routed rows on this rank")] = 4096,
    experts: Annotated[int, Option(help="E experts on this rank")] = 8,
    neurons: Annotated[int, Option(help="F neurons of an expert")] = 1408,
    ratio: Annotated[float, Option(help="r, kept neurons / F")] = 0.25,
    neuron_block: Annotated[int, Option(help="B neurons chosen together")] = 1,
    neuron_groups: Annotated[int, Option(help="G groups that each keep S / G")] = 1,
    dtype: Literal[*DTYPES] = "fp32",  # type: ignore[valid-type]
    activation: Literal[*ACTIVATIONS] = "silu",  # type: ignore[valid-type]
    device: Literal["cpu", "cuda"] = "cpu",
    table_from: Annotated[
        Path | None, Option(metavar="RESULTS", help="of make bench, or answer.json of gpu-answer")
    ] = None,
    table: Annotated[
        Path, Option(help="where to write it (kernels/measured.json)", show_default=False)
    ] = measured.TABLE,
) -> None:
    """Ask every backend, and print a line each and the choice."""
    if table_from is not None:
        print(f"{table}: {measured.write_table(table_from, table)} cells")
        return
    if tokens < 0 or experts < 1:
        raise ValueError("--tokens must be 0 or more and --experts 1 or more")
    kept = round(ratio * neurons)
    Selection(kept, neuron_groups, neuron_block).check(neurons)
    call = Call(
        device, DTYPES[dtype], activation, rows=tokens, experts=experts, neurons=neurons,
        kept_share=kept / neurons, block=neuron_block, groups=neuron_groups,
    )  # fmt: skip
    for backend in BACKENDS.values():
        reason = backend.why_not(call)
        note = f" ({backend.note})" if backend.note else ""
        print(f"{backend.name:10s} {'usable' if reason is None else 'not usable: ' + reason}{note}")
    chosen = choose_backend("auto", call)
    print(f"{'auto':10s} {chosen.backend.name}: {chosen.reason}")


if __name__ == "__main__":
    sys.exit(program.main())
