"""What fine-tuning on another text gives MoNE and the dense MoE, and what they forget by it.

The models are ratio's, after their training; the other text is the language reference that Python
has for its help, in the tokenizer of the first.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron_mone.studies.catalogue import ratio, small
from megatron_mone.studies.curves import measured_curves
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import nats
from megatron_mone.studies.measuring.forgetting import NEW, OLD
from megatron_mone.studies.page import interval
from megatron_mone.studies.statistics import Estimate, difference, estimate
from megatron_mone.studies.study import Cell, Preset, Section, Study, Trained, Values
from megatron_mone.studies.tasks import Task

CORPUS = "python-reference"
MONE, TOTAL, ACTIVE = ratio.mone(ratio.MAIN), ratio.TOTAL, ratio.ACTIVE
_SHARE = 4
"""Steps of the base for one of fine-tuning."""
_CHECKPOINTS = 4
_WORD = {OLD: "first", NEW: "new"}


def tuned(name: str) -> str:
    """The name of the cell that goes on with another."""
    return f"{name}, fine-tuned"


def cells(values: Values) -> Sequence[Cell]:
    """Three of ratio's, and each fine-tuned at a third of its learning rate, for fewer steps."""
    bases = [one for one in ratio.cells(values) if one.name in (MONE, TOTAL, ACTIVE)]
    steps = max(2, values["train_iters"] // _SHARE)
    often = max(1, steps // _CHECKPOINTS)
    shorter = {
        "train_iters": steps, "lr": values["lr"] / 3, "min_lr": values["min_lr"] / 3,
        "lr_warmup_iters": max(1, steps // 10), "eval_interval": often, "save_interval": often,
        "log_interval": often, "split": "900,100,0", "eval_iters": min(8, values["eval_iters"]),
    }  # fmt: skip
    return [
        *bases,
        *(Cell(tuned(one.name), f"{one.name} after its training, on {CORPUS}",
               {**one.values, **shorter}, after=one.name, corpus=CORPUS)
          for one in bases),
    ]  # fmt: skip


def tasks(runs: Sequence[Trained], models: Mapping[str, Path], preset: Preset) -> Sequence[Task]:
    """One a fine-tuned run."""
    del models
    folders = {(one.cell.name, one.seed): str(one.folder / "checkpoints") for one in runs}
    return [
        Task(one.cell.name, one.seed, "forgetting:losses",
             {"base": folders[one.cell.after, one.seed],
              "tuned": folders[one.cell.name, one.seed], **preset.measuring})
        for one in runs
        if one.cell.after
    ]  # fmt: skip


def change(results: StudyResults, of: str, name: str) -> dict[int, float]:
    """Seed -> nats a token that a loss is higher after fine-tuning than before."""
    return {seed: one.y[-1] - one.y[0] for seed, one in results.measured(of, name).items()}


def beside(results: StudyResults, of: str, other: str) -> Estimate:
    """Nats a token that a loss of MoNE rises more by fine-tuning than that of another model."""
    return difference(change(results, of, tuned(MONE)), change(results, of, tuned(other)))


def findings(results: StudyResults) -> list[str]:
    """What each gains and forgets, then MoNE's against each dense MoE's."""
    names = results.who(OLD)
    found = [
        f"{name}: {nats(_mean(results, NEW, name))} of the {_WORD[NEW]} text, "
        f"{nats(_mean(results, OLD, name))} of the {_WORD[OLD]}."
        for name in names
    ]
    for other in (TOTAL, ACTIVE):
        if tuned(other) in names:
            found += [_told(results, NEW, other, "gains"), _told(results, OLD, other, "forgets")]
    return found


def _mean(results: StudyResults, of: str, name: str) -> Estimate:
    return estimate([*change(results, of, name).values()])


def _told(results: StudyResults, of: str, other: str, verb: str) -> str:
    """Whether MoNE gains or forgets more than another; a gain is a loss that falls."""
    found = beside(results, of, other)
    if not found.is_clear:
        words = f"Whether {MONE} {verb} more or less than {other} by it cannot be told"
    else:
        word = "more" if (found.mean > 0) == (of == OLD) else "less"
        words = f"{MONE} {verb} {word} than {other} by it"
    seeds = "of one seed" if found.half_width is None else f"{found.count} seeds paired"
    return f"{words}: {nats(found)} of the {_WORD[of]} text, {seeds}."


def sections(results: StudyResults) -> Sequence[Section]:
    """Losses before and after, and both texts' by step."""
    names = results.who(OLD)
    header = ("cell", "new text before", "after", "first text before", "after", "forgotten")
    rows = [
        [name, *(interval(point, ".4f") for of in (NEW, OLD) for point in _ends(results, of, name)),
         interval(_mean(results, OLD, name), "+.4f")]
        for name in names
    ]  # fmt: skip
    return [
        Section(
            "What is gained and what is forgotten",
            [f"Losses in nats a token of text that both runs held out: the first text is "
             f"Shakespeare's, the new one {CORPUS}. Step 0 is before fine-tuning."],
            table=(header, rows),
        ),
        *(Section(of.partition(",")[0].capitalize(), figure=(
              partial(measured_curves, results, [(of, name, name) for name in names],
                      x="step of fine-tuning", y=of),
              "Mean of seeds with its 95% interval."))
          for of in (NEW, OLD)),
    ]  # fmt: skip


def _ends(results: StudyResults, of: str, name: str) -> tuple[Estimate, Estimate]:
    """Before and after fine-tuning."""
    curve = results.curve(of, name)
    return curve[0][1], curve[-1][1]


STUDY = Study(
    name="finetune",
    question="What do MoNE and the dense MoE gain by fine-tuning on a small text of another kind, "
    "and what do they forget?",
    presets={
        "tiny": Preset(
            small.training(small.TINY_STEPS), seeds=2, measuring={"windows": 8},
            only=(MONE, TOTAL, tuned(MONE), tuned(TOTAL)),
        ),
        "cpu": Preset(small.training(small.CPU_STEPS), measuring={"windows": 128}),
    },
    cells=cells,
    reference=TOTAL,
    findings=findings,
    limits=(
        "Models of 2 layers and half a million tokens, fine-tuned on an eighth of a million: "
        "English of the 17th century and of a manual.",
        "One learning rate of fine-tuning, a third of the training's, chosen for none of the "
        "models; all weights are tuned, and none of the first text is read again.",
        "The new text is of the Python that runs the study; another version's differs a little, "
        "and its runs are others.",
    ),
    tasks=tasks,
    sections=sections,
)  # fmt: skip
