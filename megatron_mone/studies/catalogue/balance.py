"""Whether the balance loss balances neurons, by type, coefficient and scope, and its price."""

from collections.abc import Sequence

from megatron_mone.studies.catalogue import small
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import compared, use
from megatron_mone.studies.study import Cell, Preset, Study, Values

NONE, DEFAULT = "none", "selected, 0.1"


def cells(values: Values) -> Sequence[Cell]:
    """Every type at one coefficient, the default type at others and over the global batch, none."""
    del values
    coefficients = [("raw", 0.1), ("normalized", 0.1), ("entropy", 0.1)]
    coefficients += [("selected", one) for one in (1e-3, 1e-2, 0.1, 1.0)]
    return [
        Cell(NONE, "coefficient 0", {"mone_ng_loss_coeff": 0.0}),
        *(Cell(f"{kind}, {one:g}", f"P of the type {kind}, coefficient {one:g}",
               {"mone_ng_loss_type": kind, "mone_ng_loss_coeff": one})
          for kind, one in coefficients),
        Cell("selected, 0.1, global", "statistics over all rows of the last step",
             {"mone_ng_loss_scope": "global_batch"}),
        Cell("bias", "no loss: a bias for choosing, moved by the sign of the load's error",
             {"mone_ng_loss_type": "bias"}),
    ]  # fmt: skip


def findings(results: StudyResults) -> list[str]:
    """What became of the neurons, then each loss against none."""
    others = [cell.name for cell in results.cells if cell.name != NONE]
    return [*use(results), *(compared(results, name, NONE) for name in others)]


STUDY = Study(
    name="balance",
    question="Does the neuron balance loss keep neurons in use, which form, and at what loss?",
    presets={
        "tiny": Preset(small.training(small.TINY_STEPS), seeds=2, only=(NONE, DEFAULT)),
        "cpu": Preset(small.training(small.CPU_STEPS)),
    },
    cells=cells,
    reference=NONE,
    findings=findings,
    limits=(
        "Models of 2 layers and under a million tokens: neurons die and specialise over longer "
        "trainings.",
        "The published coefficient and scope are not known to us; post-top-k P is not among the "
        "types here.",
    ),
)
