"""One run of W&B and of MLflow over two starts of a training run: what TensorBoard has, each step
once, with either engine; and training that goes on where trackers fail."""

from pathlib import Path

import pytest

from megatron_mone.common import checked_json
from megatron_mone.model.trackers.opening import BOOK
from tests.integration import tracker_ranks
from tests.stand_ins import noted, steps
from tests.training_cases import MOCK, MONE, TINY, Case, run_cases, scalars

pytestmark = pytest.mark.slow

ENGINES = ("megatron", "deepspeed")
BASE = (*TINY, *MONE, *MOCK, "--expert-model-parallel-size", "2", "--log-timers-to-tensorboard",
        *("--eval-iters", "1", "--eval-interval", "2"))  # fmt: skip
TAGS = ("lm loss", "lm loss validation", "grad-norm", "mone/ng_loss", "mone/kept_ratio_layer_2",
        "mone/executed_tflops_per_rank")  # fmt: skip


def tracked(folder: Path, name: str) -> tuple[str, ...]:
    return (
        *("--wandb-project", name, "--wandb-exp-name", "tiny", "--wandb-save-dir", f"{folder}/w"),
        *("--mlflow-experiment", name, "--mlflow-tracking-uri", f"{folder}/mlflow"),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each engine three steps, then, from the second's checkpoint on, the third to the fifth."""
    folder = tmp_path_factory.mktemp("trackers")
    cases = []
    for engine in ENGINES:
        save = f"{folder}/{engine}"
        given = (
            *BASE,
            *tracked(folder, f"of-{engine}"),
            "--engine",
            engine,
            "--save",
            save,
            "--save-interval",
            "2",
        )
        cases += [
            Case(f"{engine} first", (*given, "--train-iters", "3")),
            Case(f"{engine} second", (*given, "--train-iters", "5", "--load", save,
                                      "--ckpt-step", "2")),
        ]  # fmt: skip
    cases.append(Case("gone", (*BASE, *tracked(folder, "gone"), "--train-iters", "3")))
    run_cases(cases, 2, folder, tracker_ranks.main)
    return folder


def of(runs: Path, tracker: str, engine: str) -> Path:
    """The file of an engine's run, by the id beside its checkpoints."""
    ids = checked_json.load(runs / engine / BOOK, "")
    assert len(ids) == 2
    return runs / tracker / f"{next(v for k, v in ids.items() if k.startswith(tracker))}.jsonl"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_run_goes_on_and_has_each_step_once(runs, tracker, engine):
    file = of(runs, tracker, engine)
    assert [entry["step"] for entry in noted(file, "log")] == [1, 2, 3, 4, 5]
    for tag in TAGS:
        first, second = (scalars(runs / f"{engine} {n}", tag) for n in ("first", "second"))
        assert {2, 4} <= {*first, *second} - ({*first} & {*second}), tag
        wanted = {**second, **first}  # the third step's are the first's
        assert steps(file, tag) == [(s, pytest.approx(wanted[s])) for s in sorted(wanted)], tag
    assert not any(" vs samples" in name for e in noted(file, "log") for name in e["values"])


@pytest.mark.parametrize("engine", ENGINES)
def test_wandb_is_told_what_begins_and_ends(runs, engine):
    file = of(runs, "wandb", engine)
    starts, ends = noted(file, "init"), noted(file, "finish")
    assert [(s["resume"], s["name"], s["experts"]) for s in starts] == [("allow", "tiny", 4)] * 2
    assert [end["exit_code"] for end in ends] == [0, 0]
    assert len(noted(file, "artifact")) == 4  # checkpoints of steps 2, 3, 4 and 5


@pytest.mark.parametrize("engine", ENGINES)
def test_mlflow_has_parameters_once_and_the_end(runs, engine):
    file = of(runs, "mlflow", engine)
    parameters = [name for entry in noted(file, "params") for name in entry["values"]]
    assert len(set(parameters)) == len(parameters)
    assert {"lr", "mone_neuron_ratio", "engine"} <= set(parameters)
    assert [entry["status"] for entry in noted(file, "status")] == [
        "FINISHED", "RUNNING", "FINISHED",
    ]  # fmt: skip


def test_one_rank_writes(runs):
    assert len(list((runs / "wandb").glob("*.jsonl"))) == 3
    assert len(list((runs / "mlflow").glob("*.jsonl"))) == 3


def test_training_goes_on_where_trackers_fail(runs):
    """A line a tracker, no password in it, and all steps."""
    assert sorted(scalars(runs / "gone", "lm loss")) == [1, 2, 3]
    log = (runs / "megatron first.log").read_text(errors="replace")
    said = [line for line in log.splitlines() if "training goes on" in line]
    assert sorted(line.split(": ")[1] for line in said) == ["MLflow", "W&B"]
    assert "secret" not in log
    assert log.count("not logged again") == 2 * len(ENGINES)
