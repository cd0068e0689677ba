"""A bounded call returns, raises or is killed; it never outlives its time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.preflight.bounded import CallFailed, bounded, one_line


def fail() -> None:
    raise RuntimeError("no luck\nat all")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_gone(pid: int) -> bool:
    """Ended; whether its parent has collected it is not ours to say."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_call_returns_its_value_from_another_process() -> None:
    assert bounded(lambda: {"pid": os.getpid()}, 10)["pid"] != os.getpid()
    large = "x" * 300_000  # more than a pipe holds
    assert bounded(lambda: large, 10) == large


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (fail, r"^RuntimeError: no luck$"),
        (die, r"^its process ended with status -9$"),
        (lambda: sys.exit(3), r"^SystemExit: 3$"),
        (lambda: object(), r"^TypeError: .*not JSON serializable$"),
    ],
)
def test_a_call_that_fails_says_how(call, says: str) -> None:
    with pytest.raises(CallFailed, match=says):
        bounded(call, 10)


def test_a_call_that_hangs_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def hang() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note.write_text(str(os.getpid()))
        time.sleep(600)

    with pytest.raises(CallFailed, match=r"^no answer in 2 s$"):
        bounded(hang, 2)
    assert is_gone(int(note.read_text()))


def test_an_answer_that_comes_too_late_goes_nowhere() -> None:
    """The child must not go on as a second parent when its pipe is gone."""
    code = (
        "import time\nimport launch.preflight.bounded as module\n"
        "module._end = lambda child: 0\n"  # a parent that does not get to kill it
        "try:\n  module.bounded(lambda: time.sleep(0.8), 0.3)\n"
        "except Exception as error:\n  print(type(error).__name__, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )  # returns when the child has closed its stderr too
    assert (done.stdout, done.stderr) == ("CallFailed\n", "")


def test_a_child_of_the_call_that_keeps_the_pipe_is_not_waited_for() -> None:
    def leave_a_child() -> int:
        child = os.fork()
        if not child:
            time.sleep(600)
        return child

    child = bounded(leave_a_child, 60)
    os.kill(child, signal.SIGKILL)  # its being there shows that the call came back before


def test_the_child_of_a_killed_parent_ends_by_itself(tmp_path: Path) -> None:
    code = (
        "import os, time, pathlib; from launch.preflight.bounded import bounded\n"
        f"note = pathlib.Path({str(tmp_path / 'pid')!r})\n"
        "def hang():\n"
        "    note.write_text(str(os.getpid())); os.kill(os.getppid(), 9); time.sleep(600)\n"
        "bounded(hang, 2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    deadline = time.monotonic() + 120
    while not is_gone(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_no_time_left_is_a_failure_and_starts_nothing() -> None:
    with pytest.raises(CallFailed, match="no time was left"):
        bounded(die, 0)


def test_what_a_call_prints_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    bounded(lambda: os.write(1, b"NCCL version"), 10)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "NCCL version")


def test_an_exception_is_one_line_of_bounded_length() -> None:
    assert one_line(ValueError("a\nb")) == "ValueError: a"
    assert len(one_line(ValueError("x" * 1000))) == 300
    assert one_line(ValueError()) == "ValueError: "
