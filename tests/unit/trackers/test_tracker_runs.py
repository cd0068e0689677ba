"""Which run a start goes on with, what is handed on of a step, and how a run's end is told."""

import contextlib
import json
import threading
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_mone.common.exit_status import LEASE_LOST, NOT_FINITE, STOPPED
from megatron_mone.model.trackers import attach, opening, runs
from megatron_mone.model.trackers.attach import Gathered
from tests import stand_ins
from tests.stand_ins import noted, steps


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(stand_ins.HERE))
    for name in ("WANDB_RUN_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_FINISH_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")  # which would stay set
    monkeypatch.setenv("WANDB_STAND_IN", str(tmp_path / "wandb"))
    runs.forget_told()


def given(folder: Path, **others: object) -> Namespace:
    values = {
        "save": str(folder / "save"), "wandb_project": "p", "wandb_exp_name": "n",
        "wandb_entity": None, "wandb_save_dir": None, "mlflow_experiment": "e",
        "mlflow_run_name": None, "mlflow_tracking_uri": str(folder / "mlflow"), "num_experts": 4,
        "kitchen_config_file": None, "rank": 0, "world_size": 1,
    }  # fmt: skip
    (folder / "save").mkdir(exist_ok=True)
    return Namespace(**{**values, **others})


def opened(args: Namespace) -> list:
    """As one start of a run has them; Megatron's own variable is of one start."""
    from megatron.training import global_vars

    global_vars._GLOBAL_WANDB_WRITER = None
    try:
        return opening.opened(args)
    finally:
        global_vars._GLOBAL_WANDB_WRITER = None


def test_another_start_goes_on_and_another_name_does_not(tmp_path, capsys):
    first = opened(given(tmp_path))
    for run in first:
        run.log({"loss": 4.0}, 7)
        run.end(runs.KILLED)
    second = opened(given(tmp_path))
    assert [run.id for run in second] == [run.id for run in first]
    assert [run.first for run in first] == [0, 0]
    assert [run.first for run in second] == [8, 8]
    assert "after step 7" in capsys.readouterr().err
    third = opened(given(tmp_path, wandb_exp_name="m", mlflow_run_name="m"))
    assert not {run.id for run in third} & {run.id for run in first}
    book = json.loads((tmp_path / "save" / opening.BOOK).read_text())
    assert list(book.values()) == [run.id for run in (*first, *third)]


def test_the_users_id_wins_and_without_checkpoints_none_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    (run,) = opened(
        given(tmp_path, mlflow_experiment=None, save=None, wandb_save_dir=str(tmp_path))
    )
    assert run.id == "mine"
    assert not (tmp_path / "save" / opening.BOOK).exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"wandb_project": "refused"}, "wandb_project = 'refused': ValueError: No API key"),
        ({"mlflow_tracking_uri": "ftp://u:hunter2@x"}, "mlflow_tracking_uri = 'ftp://x': ValueE"),
        ({"mlflow_tracking_uri": None}, "mlflow_experiment = 'e': ValueError: unsupported"),
    ],
)
def test_what_cannot_begin_is_one_line(tmp_path, wrong, says):
    with pytest.raises(ValueError) as error:
        opened(given(tmp_path, **wrong))
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)
    assert "hunter2" not in str(error.value)


def test_a_known_run_that_does_not_open_holds_nothing_up(tmp_path, capsys):
    """The server is away when a job is queued again."""
    _, run = opened(given(tmp_path))
    run.end(runs.FAILED)
    (tmp_path / "mlflow" / f"{run.id}.jsonl").unlink()
    assert [run.tracker for run in opened(given(tmp_path))] == ["W&B"]
    assert f"training goes on without run {run.id}" in capsys.readouterr().err


def test_a_damaged_book_is_named(tmp_path):
    args = given(tmp_path)
    for text in ("{", '{"wandb /p/n": 1}', "[]"):
        (tmp_path / "save" / opening.BOOK).write_text(text)
        with pytest.raises(ValueError, match=r"trackers.json.*remove it"):
            opened(args)


class Held:
    """A run that keeps what it is given."""

    tracker = "held"
    id = "1"

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.got: list = []
        self.status: list[str] = []

    def log(self, values, step):
        if step == 3:
            raise ConnectionError("gone")
        self.got.append((step, dict(values)))

    def end(self, status):
        self.status.append(status)


def test_a_step_is_handed_on_once_and_what_fails_is_said_once(capsys):
    new, old = Held(), Held(first=2)
    gathered = Gathered([new, old])
    for step in (1, 2, 3, 4):
        gathered.add({"a": step}, step)
        gathered.add({"a": step, "b": 0.5}, step)
    assert [step for step, _ in new.got] == [1, 2]
    gathered.hand_on()
    gathered.hand_on()
    assert new.got == [(step, {"a": step, "b": 0.5}) for step in (1, 2, 4)]
    assert [step for step, _ in old.got] == [2, 4]
    said = capsys.readouterr().err
    assert said.count("gone; training goes on") == 1
    assert said.count("has steps to 1 already") == 1


@pytest.mark.parametrize(
    ("how", "status"),
    [
        (None, [runs.FINISHED]), (SystemExit(0), [runs.FINISHED]), (SystemExit(), [runs.FINISHED]),
        (SystemExit(STOPPED), [runs.KILLED]), (KeyboardInterrupt(), [runs.KILLED]),
        (SystemExit(NOT_FINITE), [runs.FAILED]), (RuntimeError("x"), [runs.FAILED]),
        (SystemExit(LEASE_LOST), []),
    ],
    ids=repr,
)  # fmt: skip
def test_the_end_is_told_as_training_ends(monkeypatch, how, status):
    run = Held()
    gathered = Gathered([run])
    gathered.add({"a": 1.0}, 1)
    monkeypatch.setattr(attach, "_gathered", gathered)
    with contextlib.suppress(BaseException), attach.ending():
        if how is not None:
            raise how
    assert run.status == status
    assert bool(run.got) == bool(status)
    with attach.ending():
        pass
    assert run.status == status


def test_wandb_takes_another_starts_config_and_is_told_of_preemption(tmp_path):
    import wandb

    for name, exit_code in (("a", 1), ("b", 0)):
        (run,) = opened(given(tmp_path, mlflow_experiment=None))
        writer = attach._WandbWriter(wandb, Gathered([run]))
        writer.config.update({"slurm_job_name": name})
        writer.finish()
        run.end(runs.FINISHED if exit_code == 0 else runs.KILLED)
    kinds = [e["kind"] for e in noted(tmp_path / "wandb" / f"{run.id}.jsonl")]
    assert kinds == ["init", "config", "preempting", "finish", "init", "config", "finish"]


class Client:
    """MLflow's, of a server that does not answer the second call."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.calls = 0
        self.refused = threading.Event()

    def log_batch(self, run_id, metrics):
        self.calls += 1
        if self.calls == 2:
            self.refused.set()
            raise ConnectionError("away")
        values = {metric.key: metric.value for metric in metrics}
        stand_ins.note(self.file, kind="log", step=metrics[0].step, values=values)

    def set_terminated(self, run_id, status):
        stand_ins.note(self.file, kind="status", status=status)


def test_mlflow_goes_on_after_an_outage_and_its_rest_does_not_hold_up_the_end(tmp_path, capsys):
    client = Client(tmp_path / "run.jsonl")
    run = runs.MLflowRun(client, "run", 0)
    for step in (1, 2, 3):
        run.log({"loss": 1.0 / step}, step)
    assert client.refused.wait(60)
    assert [step for step, _ in steps(client.file, "loss")] == [1]  # it rests
    run.end(runs.FINISHED)
    assert steps(client.file, "iteration") == [(1, 1), (3, 3)]
    assert noted(client.file, "status") == [{"kind": "status", "status": "FINISHED"}]
    assert capsys.readouterr().err.count("away; training goes on") == 1


def test_mlflow_that_hangs_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "END_SECONDS", 0.01)
    ever = threading.Event()
    client = Client(tmp_path / "run.jsonl")
    client.log_batch = lambda run_id, metrics: ever.wait()
    run = runs.MLflowRun(client, "run", 0)
    run.log({"loss": 1.0}, 1)
    with pytest.raises(TimeoutError, match="not sent"):
        run.end(runs.FINISHED)
    ever.set()
