"""Runs are never repeated, never mixed, and say why they failed."""

import os
import signal
import sys
from dataclasses import fields, replace

import psutil
import pytest

from launch.runs.kept_runs import KeptRun, TrainingError, ensure_run, finished, train_here
from launch.spec.launch_spec import LaunchSpec
from launch.spec.training_job import Job
from megatron_mone.data.manifest import SCHEMA, FileFacts, Manifest, TokenizerFacts, manifest_path
from megatron_mone.reporting.page.results import ResultError
from tests.unit.reporting.conftest import write_run


def ignore(step: int, loss: float) -> None:
    pass


def write_data(folder, sha256):
    """The manifest of a prepared dataset."""
    file = FileFacts("data", 1, sha256)
    facts = dict.fromkeys((field.name for field in fields(Manifest)), 0)
    facts |= {"inputs": [], "bin": file, "idx": file, "schema": SCHEMA}
    facts["tokenizer"] = TokenizerFacts("bpe", "bpe:9", "data.tokenizer", sha256, 9, 0, "<eod>")
    manifest_path(folder / "data_text_document").write_bytes(Manifest(**facts).to_json())


def run_of(folder, values, command=("true",)):
    spec = LaunchSpec("mone", tuple(command), workdir=str(folder.parent), folder=str(folder))
    config = {"values": values, "arguments": [], "sweep": False}
    return KeptRun(Job(spec, config, (str(folder.parent / "data_text_document"),)), ("python",))


@pytest.fixture
def spec(tmp_path):
    write_data(tmp_path, "abc")
    return run_of(tmp_path / "mone", {"train_iters": 4, "lr": 0.1})


class FakeTrainer:
    """Writes a run's files; `fails` times it stops after two steps first."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.calls, self.found = fails, 0, []

    def __call__(self, spec, on_step):
        self.calls += 1
        found = sorted(path.name for path in spec.folder.iterdir())
        self.found.append([name for name in found if not name.endswith(".lock")])
        (spec.folder / "checkpoints").mkdir(exist_ok=True)
        if self.calls <= self.fails:
            raise TrainingError("stopped")
        write_run(spec.folder / "tensorboard", steps=spec.steps)
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
    assert train.found == [["manifest.json"], ["checkpoints", "manifest.json"]]


@pytest.mark.parametrize(
    ("change", "data"), [({"train_iters": 6}, "abc"), ({"lr": 0.2}, "abc"), ({}, "abd")]
)
def test_another_fingerprint_starts_afresh(tmp_path, spec, change, data):
    train = FakeTrainer()
    ensure_run(spec, train, ignore)
    write_data(tmp_path, data)
    other = run_of(spec.folder, {"train_iters": 4, "lr": 0.1, **change})
    assert finished(other) is None
    assert ensure_run(other, train, ignore).steps == other.steps
    assert train.found[1] == ["manifest.json"]


def test_a_folder_of_the_demo_before_the_launcher_starts_afresh(spec):
    (spec.folder / "checkpoints").mkdir(parents=True)
    (spec.folder / "state.json").write_text('{"fingerprint": "abc"}')
    train = FakeTrainer()
    ensure_run(spec, train, ignore)
    assert train.found == [["manifest.json"]]


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
        write_run(spec.folder / "tensorboard", steps=spec.steps - 1)

    with pytest.raises(ResultError, match="ends at step 3, not 4"):
        ensure_run(spec, train, ignore)
    assert finished(spec) is None


def child(tmp_path, script, ranks=1):
    run = run_of(tmp_path / "mone", {"train_iters": 4}, (sys.executable, "-c", script))
    spec = replace(run.job.spec, tasks_per_node=ranks)
    return replace(run, job=replace(run.job, spec=spec))


def logs(tmp_path):
    return sorted((tmp_path / "mone/logs").glob("*/rank-*.log"))


def test_log_lines_become_steps(tmp_path):
    line = " [now] iteration       20/     400 | consumed samples: 3 | lm loss: 5.974150E+00 | x"
    steps = []
    train_here(child(tmp_path, f"print({line!r})"), lambda *at: steps.append(at))
    assert steps == [(20, 5.97415)]
    (log,) = logs(tmp_path)
    assert log.read_text() == line + "\n"


def test_a_users_mistake_is_one_line_and_the_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = (
        "import sys\nprint('megatron-mone: error: lr = -1 must be positive', "
        "file=sys.stderr)\nprint('Traceback: torch.distributed.elastic noise')\nsys.exit(1)"
    )
    with pytest.raises(TrainingError) as caught:
        train_here(child(tmp_path, script), ignore)
    (log,) = logs(tmp_path)
    assert str(caught.value) == (
        f"megatron-mone: error: lr = -1 must be positive\nlog: {log.relative_to(tmp_path)}"
    )


def test_a_crash_shows_the_last_lines_and_the_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = "for i in range(100):\n  print('line', i)\nraise SystemExit(3)"
    with pytest.raises(TrainingError) as caught:
        train_here(child(tmp_path, script), ignore)
    lines = str(caught.value).splitlines()
    assert lines[0] == "training ended with status 3:"
    assert lines[1:-1] == [f"line {i}" for i in range(85, 100)]
    (log,) = logs(tmp_path)
    assert lines[-1] == f"log: {log.relative_to(tmp_path)}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_ranks_too(tmp_path, number):
    """Both are asked to end, as Megatron's ranks save then, whoever got the signal."""
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
        "while os.environ['RANK'] == '1' and not os.path.exists('up'):\n  time.sleep(0.05)\n"
        "open('up', 'w').close()\n"
        "print('iteration 1/ 2 | lm loss:', float(os.getpgrp()), flush=True)\ntime.sleep(600)"
    )
    ranks = []

    def interrupt(step, group):  # each rank has its own, or a terminal's Ctrl-C would be for it too
        ranks.append(int(group))
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train_here(child(tmp_path, script, 2), interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not psutil.pid_exists(ranks[0])
    assert [log.read_text().split()[-1] for log in logs(tmp_path)] == ["saved", "saved"]
