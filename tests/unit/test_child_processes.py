"""Children end with their parent, by whatever signal it ends, through programs between them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mone.common import child_processes
from tests.processes import gone, marked, new_mark

ROOT = Path(__file__).resolve().parents[2]
SLEEP = "[sys.executable, '-c', 'import time; time.sleep(600)']"
IMPORTS = "import os, subprocess, sys, time\nfrom megatron_mone.common.child_processes import *\n"
STARTS = f"{IMPORTS}subprocess.Popen({SLEEP}, preexec_fn=tied(), start_new_session=True)\n"
WAITS = "print('up', flush=True)\ntime.sleep(600)"


def start(code: str, mark: dict[str, str], **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **mark, **more}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", ["KILL", "TERM", "INT", "HUP", "ABRT"])
def test_a_child_in_its_own_session_ends_with_its_parent(number):
    mark = new_mark()
    parent = start(STARTS + WAITS, mark)
    assert said(parent) == "up"
    assert len(marked(mark)) == 2
    parent.send_signal(getattr(signal, f"SIG{number}"))
    parent.wait(60)
    assert gone(mark)


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0", "os._exit(0)", "os.abort()"])
def test_a_child_ends_where_its_parent_does(end):
    mark = new_mark()
    start(f"{STARTS}sys.stderr = None\n{end}", mark).wait(60)
    assert gone(mark)


def test_the_link_holds_through_exec():
    mark = new_mark()
    command = f"['sh', '-c', 'exec \"$@\"', 'sh', 'env', *{SLEEP}]"
    parent = start(f"{IMPORTS}subprocess.Popen({command}, preexec_fn=tied())\n{WAITS}", mark)
    assert said(parent) == "up"
    parent.kill()
    parent.wait(60)
    assert gone(mark)


BELOW = f"""{IMPORTS}
time.sleep(float(sys.argv[1]))
end_with_starter()
assert STARTER_VARIABLE not in os.environ
print('up', flush=True)
time.sleep(600)"""
BETWEEN = (
    f"{IMPORTS}subprocess.run([sys.executable, '-c', {BELOW!r}, DELAY], start_new_session=True)"
)


def between(delay: float) -> str:
    """A starter, a program that is not ours, and a process of ours that ties itself late."""
    code = BETWEEN.replace("DELAY", repr(str(delay)))
    return f"""{IMPORTS}
subprocess.Popen([sys.executable, '-c', {code!r}], env={{**os.environ, **named_here()}},
                 preexec_fn=tied())
time.sleep(600)"""


def test_a_rank_below_a_launcher_ends_with_the_starter():
    mark = new_mark()
    starter = start(between(0), mark)
    assert said(starter) == "up"
    assert len(marked(mark)) == 3
    starter.kill()
    starter.wait(60)
    assert gone(mark)


def test_a_rank_that_is_still_importing_when_all_above_end():
    mark = new_mark()
    starter = start(between(0.5), mark)
    deadline = time.monotonic() + 60
    while len(marked(mark)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    starter.kill()
    starter.wait(60)
    assert gone(mark)


def test_without_a_starter_a_process_is_left_alone(monkeypatch):
    for name in (child_processes.STARTER_VARIABLE, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(child_processes, "end_with", lambda parent: pytest.fail("tied"))
    child_processes.end_with_starter()


def test_a_parent_that_has_ended_before_ends_the_child():
    """The child asks for the signal too late to get it."""
    code = f"{IMPORTS}end_with(os.getppid() + 1)\nprint('lives')"
    process = start(code, new_mark())
    assert process.wait(60) == 1
    assert said(process) == ""
