"""DeepSpeed's own folders, and universal checkpoints made of them, go out and come in by value.

Three steps saved in both forms; from DeepSpeed's a run goes on to step six as one that never
stopped, and, by its own tool's universal form, at another ZeRO stage too.
"""

import os
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_mone.deepspeed.settings import LATEST, UNIVERSAL
from tests.parity.layouts import TP2, TRAIN
from tests.training_cases import Case, run_cases, scalars

pytestmark = pytest.mark.slow

STEPS, SAVED = 6, 3
LAYOUTS = {"ZeRO 0": ("0", ()), "ZeRO 1, TP2": ("1", TP2), "ZeRO 2": ("2", ()), "ZeRO 3": ("3", ())}
THROUGH_UNIVERSAL = (
    ("ZeRO 2", "ZeRO 2", "2"),
    ("ZeRO 2", "ZeRO 1", "1"),
    ("ZeRO 3", "ZeRO 3", "3"),
)


def words(stage: str, steps: int, *more: str) -> tuple[str, ...]:
    return (
        *TRAIN,
        *more,
        "--engine",
        "deepspeed",
        "--zero-stage",
        stage,
        "--train-iters",
        str(steps),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    first, then = [], []
    for name, (stage, flags) in LAYOUTS.items():
        save = ("--save", f"{folder}/torch_dist {name}", "--save-interval", str(SAVED))
        out = ("--save-deepspeed", f"{folder}/{name} folder")
        first.append(Case(f"{name} straight", words(stage, STEPS, *flags)))
        first.append(Case(f"{name} out", words(stage, SAVED, *flags, *save, *out)))
        into = ("--load-deepspeed", f"{folder}/{name} folder")
        then.append(Case(f"{name} in", words(stage, STEPS, *flags, *into)))
    run_cases(first, 2, folder)
    for name, other, stage in THROUGH_UNIVERSAL:
        universal = folder / f"{name} universal"
        if not universal.is_dir():
            _to_universal(folder / f"{name} folder", universal)
        into = ("--load-deepspeed", str(universal))
        then.append(Case(f"{name} universal > {other}", words(stage, STEPS, *into)))
    run_cases(then, 2, folder)
    return folder


def _to_universal(folder: Path, out: Path) -> None:
    """By DeepSpeed's tool."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.checkpoint import ds_to_universal

    tag = (folder / LATEST).read_text()
    ds_to_universal.main(
        Namespace(
            input_folder=str(folder / tag),
            output_folder=str(out / tag),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    (out / UNIVERSAL).write_text(tag)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_comes_in_as_it_went_out(runs, name):
    straight, went_on = (scalars(runs / f"{name} {what}", "lm loss") for what in ("straight", "in"))
    assert went_on == {step: straight[step] for step in range(SAVED + 1, STEPS + 1)}
    assert sorted(path.name for path in (runs / f"{name} folder").glob("global*")) == [
        "global_step3"
    ]


@pytest.mark.parametrize(("name", "other", "stage"), THROUGH_UNIVERSAL)
def test_a_universal_checkpoint_comes_in(runs, name, other, stage):
    straight = scalars(runs / f"{name} straight", "lm loss")
    went_on = scalars(runs / f"{name} universal > {other}", "lm loss")
    assert sorted(went_on) == list(range(SAVED + 1, STEPS + 1))
    for step, value in went_on.items():
        assert value == pytest.approx(straight[step], 1e-6)
