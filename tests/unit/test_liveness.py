"""A run shows that it lives: a file touched after steps, and stacks on request."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mone.common.patch import install
from megatron_mone.model import failure, liveness
from megatron_mone.model.liveness import (
    PATCHES,
    PROGRESS_VARIABLE,
    TOUCH_SECONDS,
    Progress,
    report_progress,
)


def test_touched_at_most_once_a_second(tmp_path, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    touched = []
    monkeypatch.setattr(Path, "touch", lambda self: touched.append((self, now[0])))
    progress = Progress(tmp_path / "42.0.progress")
    for _ in range(35):
        progress()
        now[0] += TOUCH_SECONDS / 10
    assert [path.name for path, _ in touched] == ["42.0.progress"] * 4
    assert [at for _, at in touched] == pytest.approx([50, 51, 52, 53])


def test_a_file_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(tmp_path / "absent" / "42.0.progress")
    for _ in range(3):
        now[0] += 2 * TOUCH_SECONDS
        progress()
    said = capsys.readouterr().err
    assert said == f"megatron-mone: {tmp_path}/absent/42.0.progress: No such file or directory\n"
    (tmp_path / "absent").mkdir()
    now[0] += 2 * TOUCH_SECONDS
    progress()
    assert (tmp_path / "absent" / "42.0.progress").exists()


@pytest.mark.parametrize("hook", ["on_training_step_end", "on_eval_step_end"])
def test_megatron_s_step_touches_the_file(tmp_path, monkeypatch, hook):
    from megatron.training import ft_integration

    install(PATCHES)
    path = tmp_path / "42.0.progress"
    original = getattr(ft_integration, hook)
    monkeypatch.setenv(PROGRESS_VARIABLE, str(path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(liveness, "TOUCH_SECONDS", 0.0)
    has_stepped, end_watch = failure.watch_first_step()
    end = report_progress()
    assert not path.exists()
    assert not has_stepped()
    for then in (lambda: None, end_watch, end):  # every step, not the first alone
        getattr(ft_integration, hook)()
        assert has_stepped()
        path.unlink()
        then()
    getattr(ft_integration, hook)()
    assert not path.exists()
    assert getattr(ft_integration, hook) is original


@pytest.mark.parametrize(("rank", "name"), [("1", "progress"), ("0", "")])
def test_other_ranks_and_unwatched_runs_are_left_alone(monkeypatch, rank, name):
    from megatron.training import ft_integration

    before = ft_integration.on_training_step_end
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv(PROGRESS_VARIABLE, name)
    report_progress()()
    assert ft_integration.on_training_step_end is before


def test_sigusr2_prints_all_stacks_and_the_process_goes_on():
    code = """
import sys, threading
from megatron_mone.model import liveness
liveness.dump_stacks_on_signal()
def waits_in_a_collective(): event.wait()
event = threading.Event()
thread = threading.Thread(target=waits_in_a_collective); thread.start()
print("up", flush=True)
sys.stdin.readline()
event.set(); thread.join()
print("went on")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR2)
    # To the end of the last stack; communicate() would miss what readline() has read ahead.
    stacks = ""
    while "in <module>" not in stacks:
        line = process.stderr.readline()
        assert line, stacks
        stacks += line
    out, _ = process.communicate("go\n", timeout=120)
    assert (process.returncode, out) == (0, "went on\n")
    assert stacks.startswith("Thread 0x")
    assert "in waits_in_a_collective" in stacks
