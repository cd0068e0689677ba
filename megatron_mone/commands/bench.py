"""`bench`: races and meters of single parts, each with numbers to keep."""

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from typer import Argument, BadParameter, Context, Option

from megatron_mone.benchmarking.options import Asked
from megatron_mone.common.program import PASSES_UNKNOWN, WORDS, Program

Json = Annotated[Path | None, Option("--json", help="also write the numbers here")]
Repeats = Annotated[int, Option("--repeats", help="least repeats")]
program = Program("Measure a part of MoNE against what it stands for.")
main = program.main


@program.command("experts")
def experts(asked: Asked) -> int:
    """Race MoNE's experts against dense MoE experts, on the GPU where there is one.

        megatron-mone bench experts --tokens 4096 --hidden 512 --neurons 1408 --experts 8 \\
            --ratio 0.25 --dtype fp32 --json out/cell.json
        megatron-mone bench experts --grid quick --out out/bench
    """
    from megatron_mone.benchmarking import instruction_sets

    if asked.instructions is not None:
        instruction_sets.limit(asked.instructions)
    from megatron_mone.benchmarking import cli

    try:
        checked = cli.check(asked)
    except ValueError as error:
        raise BadParameter(str(error)) from error
    return cli.run(asked, *checked)


@program.command("layer")
def layer(
    context: Context,
    tokens: Annotated[int, Option(help="T; top-2 routes 2 T rows")] = 2048,
    hidden: Annotated[int, Option(help="H")] = 512,
    neurons: Annotated[int, Option(help="F, neurons of one expert")] = 1408,
    experts: Annotated[int, Option(help="E")] = 8,
    ratio: Annotated[float, Option(help="r, kept neurons / F")] = 0.25,
    neuron_block: Annotated[int, Option(help="B neurons chosen together")] = 1,
    dtype: Annotated[Literal["fp32", "bf16"], Option()] = "fp32",
    fused: Annotated[bool, Option("--fused", help="MoNE adds into main_grad")] = False,
    repeats: Repeats = 7,
    json: Json = None,
) -> None:
    """Time and meter one MoE layer: stock Megatron's, MoNE's, MoNE's with its balance loss.

    Router, dispatcher, experts, combine and balance loss together, on one rank.
    """
    from megatron_mone.benchmarking import whole_layer

    whole_layer.run(SimpleNamespace(**context.params))


@program.command("dispatch")
def dispatch(
    context: Context,
    ranks: Annotated[int, Option(help="expert parallel ranks")] = 2,
    experts: Annotated[int, Option(help="E")] = 8,
    rows: Annotated[int, Option(help="routed rows of a rank")] = 8192,
    topk: Annotated[int, Option(help="experts of a token")] = 2,
    hidden: Annotated[int, Option(help="H")] = 2048,
    widths: Annotated[str, Option(help="F, neurons of an expert, several")] = "512,1408",
    repeats: Repeats = 7,
    json: Json = None,
) -> None:
    """Say what carrying neuron masks adds to a dispatch: bytes predicted, bytes counted, time."""
    from megatron_mone.benchmarking import dispatch_cost

    dispatch_cost.run(SimpleNamespace(**context.params))


@program.command("merge")
def merge(
    context: Context,
    out: Annotated[Path, Option(help="an empty or new folder, for the files")],
    folder: Annotated[
        Path | None, Argument(metavar="FOLDER", help="a profiling job's (built-in ones)")
    ] = None,
    ranks: Annotated[int, Option(help="ranks of the large job")] = 1024,
    steps: Annotated[int, Option(help="steps of each")] = 50,
    truncated: Annotated[bool, Option("--truncated", help="cut one file short")] = False,
) -> int:
    """Time and meter merging the rank files of a large job, made up from those of a small one."""
    from megatron_mone.benchmarking import merging

    return merging.run(SimpleNamespace(**context.params))


@program.command("profiler", context_settings=PASSES_UNKNOWN)
def profiler(
    context: Context,
    ranks: Annotated[int, Option(help="ranks to start here")] = 2,
    steps: Annotated[int, Option(help="steps of each kind")] = 60,
    window: Annotated[int, Option(help="steps in a turn")] = 3,
    json: Json = None,
) -> int:
    """Say what the profiler costs: steps with it on against steps without, in turn, in one job.

        megatron-mone bench profiler --config demo-mone --ranks 2 --steps 60 [--json OUT]

    Further flags are Megatron's.
    """
    from megatron_mone.benchmarking import profiler_cost

    options = SimpleNamespace(**context.params)
    return profiler_cost.run(options, context.args, context.meta[WORDS])
