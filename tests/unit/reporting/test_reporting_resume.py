"""Runs are never repeated, never mixed, and say why they failed."""

import sys
import time
from dataclasses import replace

import psutil
import pytest

from megatron_mone.demo.training_run import (
    RunSpec,
    TrainingError,
    ensure_run,
    finished,
    run_child,
)
from megatron_mone.reporting.page.results import ResultError
from tests.unit.reporting.conftest import write_run


def ignore(step: int, loss: float) -> None:
    pass


@pytest.fixture
def spec(tmp_path):
    return RunSpec("mone", tmp_path / "mone", 4, {"lr": 0.1, "data": ["abc"]}, ("python",))


class FakeTrainer:
    """Writes a run's files; `fails` times it stops after two steps first."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.calls, self.found = fails, 0, []

    def __call__(self, spec, on_step):
        self.calls += 1
        self.found.append(sorted(path.name for path in spec.folder.iterdir()))
        (spec.folder / "checkpoints").mkdir(exist_ok=True)
        if self.calls <= self.fails:
            raise TrainingError("stopped")
        write_run(spec.tensorboard, steps=spec.steps)
        on_step(spec.steps, 1.0)


def test_a_finished_run_is_not_trained_again(spec):
    train = FakeTrainer()
    first = ensure_run(spec, train, ignore)
    assert ensure_run(spec, train, ignore) == first
    assert train.calls == 1
    assert finished(spec) == first


def test_an_interrupted_run_keeps_its_checkpoint(spec):
    train = FakeTrainer(fails=1)
    with pytest.raises(TrainingError):
        ensure_run(spec, train, ignore)
    assert finished(spec) is None
    ensure_run(spec, train, ignore)
    assert train.found == [["state.json"], ["checkpoints", "state.json"]]


@pytest.mark.parametrize(
    "change", [{"steps": 6}, {"config": {"lr": 0.2, "data": ["abc"]}},
               {"config": {"lr": 0.1, "data": ["abd"]}}]
)  # fmt: skip
def test_another_fingerprint_starts_afresh(spec, change):
    train = FakeTrainer()
    ensure_run(spec, train, ignore)
    other = replace(spec, **change)
    assert finished(other) is None
    assert ensure_run(other, train, ignore).steps == other.steps
    assert train.found[1] == ["state.json"]


def test_a_damaged_result_is_trained_again(spec):
    train = FakeTrainer()
    ensure_run(spec, train, ignore)
    (spec.folder / "result.json").write_text('{"name": ')
    ensure_run(spec, train, ignore)
    assert train.calls == 2


def test_a_foreign_folder_is_left_alone(spec):
    spec.folder.mkdir()
    (spec.folder / "thesis.txt").write_text("precious")
    with pytest.raises(TrainingError, match="did not write"):
        ensure_run(spec, FakeTrainer(), ignore)
    assert (spec.folder / "thesis.txt").read_text() == "precious"


def test_a_child_that_writes_too_little_is_no_result(spec):
    def train(spec, on_step):
        write_run(spec.tensorboard, steps=spec.steps - 1)

    with pytest.raises(ResultError, match="ends at step 3, not 4"):
        ensure_run(spec, train, ignore)
    assert finished(spec) is None


def child(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_log_lines_become_steps(tmp_path):
    line = " [now] iteration       20/     400 | consumed samples: 3 | lm loss: 5.974150E+00 | x"
    steps = []
    run_child(child(f"print({line!r})"), tmp_path / "log", lambda *at: steps.append(at))
    assert steps == [(20, 5.97415)]
    assert (tmp_path / "log").read_text() == line + "\n"


def test_a_users_mistake_is_one_line_and_the_log(tmp_path):
    script = (
        "import sys\nprint('[rank0]: megatron-mone: error: lr = -1 must be positive', "
        "file=sys.stderr)\nprint('Traceback: torch.distributed.elastic noise')\nsys.exit(1)"
    )
    with pytest.raises(TrainingError) as caught:
        run_child(child(script), tmp_path / "log", ignore)
    assert str(caught.value) == (
        f"megatron-mone: error: lr = -1 must be positive\nlog: {tmp_path / 'log'}"
    )


def test_a_crash_shows_the_last_lines_and_the_log(tmp_path):
    script = "for i in range(100):\n  print('line', i)\n"
    script += "print('E1122 api.py:1002] failed (exitcode: 1) local_rank: 1')\nraise SystemExit(3)"
    with pytest.raises(TrainingError) as caught:
        run_child(child(script), tmp_path / "log", ignore)
    lines = str(caught.value).splitlines()
    assert lines[0] == "training ended with status 3:"
    assert lines[1:-1] == [f"line {i}" for i in range(85, 100)]
    assert lines[-1] == f"log: {tmp_path / 'log'}"


def test_an_interrupt_stops_the_ranks_too(tmp_path):
    """The launcher's ranks live in sessions of their own, as torchrun's do."""
    script = (
        "import subprocess, sys, time\n"
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n"
        "print('iteration 1/ 2 | lm loss:', float(rank.pid), flush=True)\ntime.sleep(600)"
    )
    ranks = []

    def interrupt(step, pid):
        ranks.append(int(pid))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(child(script), tmp_path / "log", interrupt)
    deadline = time.monotonic() + 120
    while psutil.pid_exists(ranks[0]) and time.monotonic() < deadline:
        if psutil.Process(ranks[0]).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert not psutil.pid_exists(ranks[0]) or (
        psutil.Process(ranks[0]).status() == psutil.STATUS_ZOMBIE
    )
