"""Which gate activation neurons are chosen by, for MoNE, and top-K against a threshold."""

from collections.abc import Sequence

from megatron_mone.studies.catalogue import small
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import compared, use
from megatron_mone.studies.study import Cell, Preset, Study, Values

GATES = ("silu", "sigmoid", "softmax", "gelu", "relu")
THRESHOLD = "silu, threshold"


def cells(values: Values) -> Sequence[Cell]:
    """A cell a gate, and a threshold's."""
    del values
    return [
        *(Cell(gate, f"neurons by the largest |{gate}(gate)|", {"mone_activation": gate})
          for gate in GATES),
        Cell(THRESHOLD, "as many as reach a tenth of the row's largest, r at most",
             {"mone_selection": "threshold", "mone_threshold": 0.1}),
    ]  # fmt: skip


def findings(results: StudyResults) -> list[str]:
    """Each against silu, then what became of the neurons."""
    others = [cell.name for cell in results.cells if cell.name != GATES[0]]
    return [*(compared(results, name, GATES[0]) for name in others), *use(results)]


STUDY = Study(
    name="activation",
    question="Which gate activation lets the fewest neurons do the most?",
    presets={
        "tiny": Preset(small.training(small.TINY_STEPS), seeds=2, only=GATES[:2]),
        "cpu": Preset(small.training(small.CPU_STEPS)),
    },
    cells=cells,
    reference=GATES[0],
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens.",
        "One learning rate for all cells; a softmax gate's scale is another from the start.",
        "No dense MoE with these gates: Megatron's own experts have silu here.",
    ),
)
