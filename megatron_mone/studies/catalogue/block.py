"""What it costs in loss to choose neurons in blocks, as matrix units would have them."""

from collections.abc import Sequence

from megatron_mone.studies.catalogue import small
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import compared, use
from megatron_mone.studies.study import Cell, Preset, Study, Values

SINGLE = "B = 1"


def cells(values: Values) -> Sequence[Cell]:
    """A cell a block size, from single neurons to one block of all that are kept."""
    kept = int(values["moe_ffn_hidden_size"] * values["mone_neuron_ratio"])
    sizes = sorted({size for size in (1, 2, 8, kept // 4, kept // 2, kept) if kept % size == 0})
    return [
        Cell(f"B = {size}", f"{kept // size} blocks of {size} adjacent neurons a row",
             {"mone_neuron_block": size})
        for size in sizes
    ]  # fmt: skip


def findings(results: StudyResults) -> list[str]:
    """Each size against single neurons."""
    others = [cell.name for cell in results.cells if cell.name != SINGLE]
    return [*(compared(results, name, SINGLE) for name in others), *use(results)]


STUDY = Study(
    name="block",
    question="What does choosing neurons in blocks of B cost in loss, at a fixed share kept?",
    presets={
        "tiny": Preset(small.training(small.TINY_STEPS), seeds=2, only=(SINGLE, "B = 32")),
        "cpu": Preset(small.training(small.CPU_STEPS), seeds=4),
    },
    cells=cells,
    reference=SINGLE,
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens.",
        "Loss alone: what a block saves in time is the planner's and the benchmarks' to say.",
    ),
)
