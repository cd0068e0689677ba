"""A killed run goes on from its last checkpoint as if it had never stopped, bit for bit."""

import time
from pathlib import Path

import psutil
import pytest

from tests.training_cases import MOCK, MONE, TINY, Case, run_cases, scalars, start

pytestmark = pytest.mark.slow

STEPS = 12
TAGS = ("lm loss", "mone/ng_loss", "grad-norm", "learning-rate")


def flags(save: Path) -> tuple[str, ...]:
    return (
        *(*TINY, *MONE, *MOCK, "--expert-model-parallel-size", "2", "--global-batch-size", "4"),
        *("--use-distributed-optimizer", "--train-iters", str(STEPS)),
        *("--save", str(save), "--load", str(save), "--save-interval", "4"),
    )


def kill_after(process, log: Path, text: str) -> None:
    """SIGKILL the launcher and its ranks, each in a session of its own, once the log has `text`."""
    deadline = time.monotonic() + 240
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < deadline, "the run never reached " + text
        time.sleep(0.02)
    ranks = psutil.Process(process.pid).children(recursive=True)
    for victim in (process, *ranks):
        victim.kill()
    process.wait()
    assert not psutil.wait_procs(ranks, timeout=30)[1], "a rank outlived SIGKILL"


def test_killed_run_resumes_bit_equal(tmp_path):
    run_cases([Case("whole", flags(tmp_path / "whole-save"))], 2, tmp_path)
    case = Case("killed", flags(tmp_path / "killed-save"))
    process = start([case], 2, tmp_path)
    log = tmp_path / "killed.log"
    kill_after(process, log, f"iteration {6:8d}/{STEPS:8d}")
    assert f"iteration {STEPS:8d}/{STEPS:8d}" not in log.read_text()
    tracker = tmp_path / "killed-save" / "latest_checkpointed_iteration.txt"
    first = int(tracker.read_text()) + 1
    assert first in (5, 9)
    (tmp_path / "killed").rename(tmp_path / "killed-before")
    run_cases([case], 2, tmp_path)
    for tag in TAGS:
        whole, resumed = scalars(tmp_path / "whole", tag), scalars(tmp_path / "killed", tag)
        assert sorted(resumed) == list(range(first, STEPS + 1)), tag
        assert resumed == {step: whole[step] for step in resumed}, tag
