"""Which gate activation neurons are chosen by, for MoNE and for the dense MoE, and top-K against a
threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_mone.studies.catalogue import large, small
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import compared, use
from megatron_mone.studies.measuring.shrunk_gates import KEPT
from megatron_mone.studies.page import interval
from megatron_mone.studies.study import Cell, Preset, Section, Study, Trained, Values
from megatron_mone.studies.tasks import Task

GATES = ("silu", "sigmoid", "softmax", "gelu", "relu", "squared_relu")
THRESHOLD = "silu, threshold"


def dense(gate: str) -> str:
    """The name of the dense MoE with a gate."""
    return f"dense, {gate}"


_ON_GPUS = (*(name for gate in GATES if gate != "softmax" for name in (gate, dense(gate))),
            THRESHOLD)  # fmt: skip
_NO_SOFTMAX = "A softmax over an expert's neurons has no GPU kernel: it was trained at small size."


def cells(values: Values) -> Sequence[Cell]:
    """Two cells a gate, and a threshold's."""
    del values
    return [
        *(Cell(gate, f"neurons by the largest |{gate}(gate)|", {"mone_activation": gate})
          for gate in GATES),
        Cell(THRESHOLD, "as many as reach a tenth of the row's largest, r at most",
             {"mone_selection": "threshold", "mone_threshold": 0.1}),
        *(Cell(dense(gate), f"every neuron: a dense MoE whose experts have the gate {gate}",
               {"mone_activation": gate, "mone_neuron_ratio": 1.0, "mone_ng_loss_coeff": 0.0})
          for gate in GATES),
    ]  # fmt: skip


def tasks(runs: Sequence[Trained], models: Mapping[str, Path], preset: Preset) -> list[Task]:
    """How many neurons a threshold keeps; of the others it is known."""
    del models
    return [
        Task(run.cell.name, run.seed, "shrunk_gates:measure",
             {"checkpoints": str(run.folder / "checkpoints"), "factors": (),
              **preset.measuring})
        for run in runs if run.cell.name == THRESHOLD
    ]  # fmt: skip


def findings(results: StudyResults) -> list[str]:
    """Each against silu, MoNE against the dense MoE gate by gate, what became of the neurons."""
    silu = GATES[0]
    pairs = [(name, silu) for name in (*GATES[1:], THRESHOLD)]
    pairs += [(dense(gate), dense(silu)) for gate in GATES[1:]]
    pairs += [(gate, dense(gate)) for gate in GATES]
    kept = [
        f"{THRESHOLD} keeps {found.mean:.1%} of the neurons of layer {layer:.0f} in held-out text."
        for layer, found in results.curve(KEPT, THRESHOLD)
    ]
    said = [compared(results, *pair) for pair in pairs if results.has(*pair)]
    return [*said, *kept, *use(results, (*GATES, THRESHOLD))]


def sections(results: StudyResults) -> list[Section]:
    """Gate by gate: MoNE beside the dense MoE."""
    rows = [
        (gate, *(interval(results.cell(name).loss, ".4f") for name in (gate, dense(gate))),
         interval(results.difference(gate, dense(gate)), "+.4f"))
        for gate in GATES if results.has(gate, dense(gate))
    ]  # fmt: skip
    return [
        Section(
            "MoNE beside the dense MoE of the same gate",
            ["Nats a token after the last step; the difference is paired by seed."],
            table=(("gate", "MoNE", "dense MoE", "MoNE over dense"), rows),
        )
    ]


STUDY = Study(
    name="activation",
    question="Which gate activation lets the fewest neurons do the most, and does the dense MoE "
    "want the same one?",
    presets={
        "tiny": Preset(small.training(small.TINY_STEPS), seeds=2, only=(GATES[0], dense(GATES[0]))),
        "cpu": Preset(small.training(small.CPU_STEPS), measuring={"windows": 16}),
        **{
            name: replace(preset, only=_ON_GPUS, limits=(*preset.limits, _NO_SOFTMAX))
            for name, preset in large.PRESETS.items()
        },
        **large.largest(GATES[0], dense(GATES[0])),
    },
    cells=cells,
    reference=GATES[0],
    findings=findings,
    tasks=tasks,
    sections=sections,
    limits=(
        "Models of 2 layers and under a million tokens.",
        "One learning rate for all cells; a softmax gate's scale is another from the start.",
        "The dense MoE is a MoNE that keeps every neuron and has no neuron balance loss: in the "
        "reference backend it equals Megatron's own experts with that gate to the bit, in others "
        "to rounding.",
    ),
)
