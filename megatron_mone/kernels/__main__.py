"""Print which backends run on this machine, and which one `auto` takes for a call and why.

    python -m megatron_mone.kernels --tokens 4096 --experts 8 --neurons 1408 --ratio 0.25

With --table-from, write the table of measured times that `auto` looks up, from a benchmark.
"""

import argparse
import sys
from pathlib import Path

from megatron_mone.kernels import BACKENDS, Call, Selection, choose_backend, measured
from megatron_mone.kernels.activations import ACTIVATIONS
from megatron_mone.kernels.race_results import DTYPES


def main() -> None:
    """Parse, ask every backend, print."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mone.kernels", description="Backends here, and auto's choice."
    )
    parser.add_argument("--tokens", type=int, default=4096, help="N routed rows on this rank")
    parser.add_argument("--experts", type=int, default=8, help="E experts on this rank")
    parser.add_argument("--neurons", type=int, default=1408, help="F neurons of an expert")
    parser.add_argument("--ratio", type=float, default=0.25, help="r, kept neurons / F")
    parser.add_argument("--neuron-block", type=int, default=1, help="B neurons chosen together")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="silu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--table-from", type=Path, metavar="RESULTS", help="of make bench")
    parser.add_argument("--table", type=Path, default=measured.TABLE, help="where to write it")
    options = parser.parse_args()
    if options.table_from is not None:
        try:
            cells = measured.write_table(options.table_from, options.table)
        except ValueError as error:
            parser.error(str(error))
        print(f"{options.table}: {cells} cells")
        return
    if options.tokens < 0 or options.experts < 1:
        parser.error("--tokens must be 0 or more and --experts 1 or more")
    kept = round(options.ratio * options.neurons)
    try:
        Selection(kept, block=options.neuron_block).check(options.neurons)
    except ValueError as error:
        parser.error(str(error))
    call = Call(
        options.device, DTYPES[options.dtype], options.activation, rows=options.tokens,
        experts=options.experts, neurons=options.neurons, kept_share=kept / options.neurons,
        block=options.neuron_block,
    )  # fmt: skip
    print_backends(call)


def print_backends(call: Call) -> None:
    """One line a backend, then the choice."""
    for backend in BACKENDS.values():
        reason = backend.why_not(call)
        note = f" ({backend.note})" if backend.note else ""
        print(f"{backend.name:10s} {'usable' if reason is None else 'not usable: ' + reason}{note}")
    try:
        chosen = choose_backend("auto", call)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{'auto':10s} {chosen.backend.name}: {chosen.reason}")


if __name__ == "__main__":
    main()
