"""The demo's checkpoints are scored once, and a failure says why."""

import json

import pytest

from launch.runs.kept_runs import TrainingError
from megatron_mone.demo import scores
from megatron_mone.evaluation.results import place_in_run
from tests.unit.launch.test_kept_runs import run_of
from tests.unit.reporting.conftest import make_evaluation

WRITES = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(parents=True); " \
         "p.write_text(sys.argv[2])"  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "version", lambda name: "1")
    return run_of(tmp_path / "mone", {"train_iters": 4})


def runs_instead(monkeypatch, *words):
    monkeypatch.setattr(scores, "_command", lambda run: ("python", "-c", *words))


def test_what_is_scored_is_not_scored_again(run, monkeypatch):
    document = make_evaluation(4, {"t": 0.5})
    place = place_in_run(run.folder, "iter_0000004", "quick") / "results.json"
    runs_instead(monkeypatch, WRITES, str(place), json.dumps(document))
    assert scores.score([run]).documents == {"mone": document}
    runs_instead(monkeypatch, "raise SystemExit(1)")
    assert scores.score([run]).documents == {"mone": document}


def test_a_failure_says_why_and_ends_the_others(run, tmp_path, monkeypatch):
    other = run_of(tmp_path / "other", {"train_iters": 4})
    ends = {run.folder: "import sys; sys.exit('no such checkpoint')",
            other.folder: "import time; time.sleep(600)"}  # fmt: skip
    monkeypatch.setattr(scores, "_command", lambda run: ("python", "-c", ends[run.folder]))
    with pytest.raises(TrainingError, match=r"mone: no scores, .* status 1:\nno such checkpoint$"):
        scores.score([run, other])


def test_without_lm_eval_nothing_is_asked(run, monkeypatch):
    monkeypatch.setattr(scores, "version", lambda name: "")
    found = scores.score([run])
    assert found.documents == {}
    assert found.commands[0][-2:] == ("--tasks", "quick")
