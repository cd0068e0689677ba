"""What routers and experts choose while they are trained: when they settle, what experts specialise
on, and how much neighbouring tokens share, which is what decoding can save."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mone.studies.catalogue import ratio, small
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.study import Cell, Preset, Study, Trained, Values
from megatron_mone.studies.tasks import Task

CHUNKS = (1, 2, 4, 8, 16)
"""Neighbouring tokens."""
MONE, MOE = ratio.mone(ratio.MAIN), ratio.TOTAL
_CHECKPOINTS = 6


def cells(values: Values) -> Sequence[Cell]:
    """Two of ratio's, with checkpoints along the way."""
    often = {"save_interval": max(1, values["train_iters"] // _CHECKPOINTS)}
    return [
        Cell(one.name, one.meaning, {**one.values, **often})
        for one in ratio.cells(values)
        if one.name in (MONE, MOE)
    ]


def tasks(runs: Sequence[Trained], models: Mapping[str, Path], preset: Preset) -> Sequence[Task]:
    """One a run."""
    del models
    windows = preset.measuring["windows"]
    return [
        Task(one.cell.name, one.seed, "analyse:measure",
             {"checkpoints": str(one.folder / "checkpoints"), "windows": windows})
        for one in runs
    ]  # fmt: skip


def findings(results: StudyResults) -> list[str]:
    """When choices settle."""
    return [
        f"{name}: after {found[0][0]:.0f} steps {found[0][1].mean:.0%} of the last choice of "
        f"experts in layer {layer} was there."
        for name in (MONE, MOE)
        for layer in (1, 2)
        if (found := results.curve(f"router saturation, layer {layer}", name))
    ]


STUDY = Study(
    name="analysis",
    question="What do routers and experts choose during training, and how much of it do "
    "neighbouring tokens share?",
    presets={
        "tiny": Preset(small.training(small.TINY_STEPS), seeds=2, measuring={"windows": 8}),
        "cpu": Preset(small.training(small.CPU_STEPS), measuring={"windows": 128}),
    },
    cells=cells,
    reference=MOE,
    findings=findings,
    limits=("Models of 2 layers and under a million tokens.",),
    tasks=tasks,
)
