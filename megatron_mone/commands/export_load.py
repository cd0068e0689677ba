"""`export-load`: how often a run kept each neuron, as a file for analysis tools."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from megatron_mone.common.program import Program

program = Program()
main = program.main


@program.command("export-load")
def export_load(
    masks: Annotated[Path, Argument(metavar="MASKS", help="folder of --mone-record-masks")],
    out: Annotated[Path, Option(metavar="FILE", help="safetensors file to write")],
    steps: Annotated[
        str | None, Option(metavar="STEPS", help="5 or 5-8 (default: all that were recorded)")
    ] = None,
) -> None:
    """Count how often each neuron of each expert was kept, from the masks that a run recorded.

        megatron-mone export-load out/masks --out load.safetensors [--steps 5-8]

    Of layer N (from 1): layer.N.kept [experts, neurons], the routed tokens that kept a neuron, and
    layer.N.rows [experts], the routed tokens; int64. Metadata: sizes, steps, tokens of each layer.
    Whatever the layout of the run, experts are whole. Exit status 2 for wrong input.
    """
    from megatron_mone.config_checks import mask_steps
    from megatron_mone.moe.masks.load import count

    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    if out.exists():
        raise ValueError(f"--out {out} is there: choose another name, or delete it")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: {out.parent} is no folder: make it, or choose another")
    found = count(masks, None if steps is None else mask_steps(steps, "--steps"))
    found.write(out)
    first, last = found.steps
    print(
        f"steps {first}-{last}: {found.model.num_experts} experts of "
        f"{found.model.moe_ffn_hidden_size} neurons"
    )
    for number, layer in found.layers.items():
        unused = int((layer.kept_EF == 0).sum())
        print(
            f"layer {number}: {layer.tokens:,} tokens, {int(layer.rows_E.sum()):,} routed, "
            f"{int(layer.kept_EF.sum()):,} neurons kept; {unused} of {layer.kept_EF.numel()} never"
        )
    print(f"wrote {out}")
