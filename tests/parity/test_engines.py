"""DeepSpeed's engine trains as Megatron's does: five steps of the same model on the same tokens.

Compared, relative to a tensor's largest entry: losses and the gradient norm of all steps, every
parameter's gradient in step 1 (reduced, before clipping) and every parameter after step 3.
"""

from pathlib import Path

import pytest

from tests.parity.conftest import ENGINES_TABLE, note
from tests.parity.engines import ENGINES, MODELS
from tests.parity.test_training_layouts import worst_error, worst_tensor_error
from tests.training_cases import Case, recorded, run_cases

pytestmark = pytest.mark.slow

STEPS = 5
LOSSES = ("lm loss", "load_balancing_loss", "mone/ng_loss")
ROWS = [
    (name, stage, model)
    for name, one in ENGINES.items() for stage in one.stages for model in MODELS
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    cases: dict[int, list[Case]] = {}
    for name, one in ENGINES.items():
        for model, flags in MODELS.items():
            words = (*flags, *one.flags, "--train-iters", str(STEPS))
            runs = [Case(f"{name}, {model}", words, tensors=True)]
            for stage in one.stages:
                own = ("--engine", "deepspeed", "--zero-stage", str(stage), *one.own)
                runs.append(Case(f"{name}, {model}, ZeRO {stage}", (*words, *own), tensors=True))
            cases.setdefault(one.ranks, []).extend(runs)
    for ranks, of_rank_count in cases.items():
        run_cases(of_rank_count, ranks, folder)
    return folder


@pytest.mark.parametrize(("name", "stage", "model"), ROWS)
def test_deepspeed_trains_as_megatron_does(runs, name, stage, model):
    theirs, ours = runs / f"{name}, {model}", runs / f"{name}, {model}, ZeRO {stage}"
    wanted, got = recorded(theirs), recorded(ours)
    assert len(wanted["lm loss"]) == STEPS
    errors = {
        "loss": max(worst_error(wanted.get(tag, {}), got.get(tag, {})) for tag in LOSSES),
        "gradient norm": worst_error(wanted["grad-norm"], got["grad-norm"]),
        "gradients": worst_tensor_error(theirs / "gradients.pt", ours / "gradients.pt"),
        "parameters": worst_tensor_error(theirs / "parameters.pt", ours / "parameters.pt"),
    }
    for column, error in errors.items():
        note(f"{name}, ZeRO {stage}, {model}", column, error, ENGINES_TABLE)
    assert max(errors.values()) <= ENGINES[name].tolerance, errors


def test_the_runs_differ_where_they_should(runs):
    """Else equal numbers would say nothing."""
    last = {recorded(runs / f"{name}, MoNE")["lm loss"][STEPS][0] for name in ENGINES}
    assert len(last) > 5
