"""What the trackers' flags need of one another, each in one line; and no password in any."""

from argparse import Namespace

import pytest

from megatron_mone.model.arguments import flag_parser
from megatron_mone.model.trackers.flags import check_trackers, without_password

WANDB = {"wandb_project": "p", "wandb_exp_name": "n", "tensorboard_dir": "t", "save": "s"}
MLFLOW = {"mlflow_experiment": "e", "tensorboard_dir": "t"}
WRONG = {
    "a run without a project": ({"wandb_exp_name": "n"}, "give both or neither"),
    "a team without a project": ({"wandb_entity": "us"}, "without --wandb-project"),
    "a server without an experiment": (
        {"mlflow_tracking_uri": "http://host"}, "without --mlflow-experiment",
    ),
    "a run without an experiment": ({"mlflow_run_name": "n"}, "without --mlflow-experiment"),
    "no name": ({**WANDB, "wandb_exp_name": None}, "give --wandb-exp-name"),
    "an empty name": ({**WANDB, "wandb_exp_name": ""}, "give --wandb-exp-name"),
    "no folder": ({**WANDB, "save": None}, "give --save or --wandb-save-dir"),
    "W&B without TensorBoard": ({**WANDB, "tensorboard_dir": None}, "--tensorboard-dir"),
    "MLflow without TensorBoard": ({**MLFLOW, "tensorboard_dir": None}, "--tensorboard-dir"),
    "a password": (
        {**MLFLOW, "mlflow_tracking_uri": "https://me:hunter2@host/x"}, "MLFLOW_TRACKING_PASSWORD",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def defaults() -> dict:
    found: dict = {}
    for action in flag_parser()._actions:
        found.setdefault(action.dest, action.default)
    return found


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(defaults, name):
    given, says = WRONG[name]
    with pytest.raises(ValueError) as error:
        check_trackers(Namespace(**{**defaults, **given}))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "given", [{}, WANDB, MLFLOW, {**WANDB, **MLFLOW, "mlflow_tracking_uri": "http://me@host:5000"}]
)
def test_what_is_right_passes(defaults, given):
    check_trackers(Namespace(**{**defaults, **given}))


def test_passwords_are_taken_out():
    text = "API request to https://me:a:b@host/api and postgresql://u:p@db/x failed, not a:b@c"
    assert without_password(text) == (
        "API request to https://host/api and postgresql://db/x failed, not a:b@c"
    )
