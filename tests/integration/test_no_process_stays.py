"""No process outlives a command, however it ends: planner, profile, torchrun, tests, make.

All that a command starts is found by a mark in its environment. Before a command is killed, all
below it are stopped (SIGSTOP): none of them can see the end of a pipe and leave by itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_mone.common.exit_status import INTERRUPTED
from tests.processes import end, gone, marked, new_mark
from tests.training_cases import MOCK, ROOT, TINY

PLAN = [
    *(sys.executable, "tools/plan_scale.py", "--model", "moe-30b-a3b-mone", "--gpus", "64"),
    *("--layout", "tp=1,pp=2,ep=8"),
]
PROFILE = [
    *(sys.executable, "tools/profile.py", "--config", "configs/demo-mone.yaml", "--ranks", "2"),
    *("--mock-data", "--steps", "4"),
]

KEEPERS = ("multiprocessing.resource_tracker", "tests/processes.py")  # which put things away


class Command:
    """A command under way, and all below it."""

    def __init__(self, command: list[str], folder: Path, **more: str) -> None:
        self.mark = new_mark()
        self.log = folder / "command.log"
        variables = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "CI": "1", **more}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **variables, **self.mark},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for a moment in which it still runs."""
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, (marked(self.mark), self.log.read_text())
            time.sleep(0.02)

    def below(self, words: str = "") -> list[int]:
        """Processes below it whose command line holds the words."""
        found = marked(self.mark)
        return [p for p in found if words in found[p] and p != self.process.pid]

    def kill(self, *, stops: bool = True) -> None:
        """SIGKILL for it, while those below can do nothing."""
        found = marked(self.mark) if stops else {}
        for process in found.keys() - {self.process.pid}:
            if any(keeper in found[process] for keeper in KEEPERS):
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        self.process.kill()
        self.process.wait()

    def stop(self, name: str) -> int:
        """Its status after a signal."""
        self.process.send_signal(getattr(signal, f"SIG{name}"))
        return self.process.wait(120)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def one(command: list[str], **more: str) -> Command:
        started.append(Command(command, tmp_path, **more))
        return started[-1]

    yield one
    for command in started:
        end(command.mark)
        command.process.wait()


def no_plan_folder(folder: Path) -> bool:
    return not list(folder.glob("megatron-mone-*"))


def test_a_planner_that_is_killed_while_its_worker_imports(start, tmp_path):
    plan = start([*PLAN, "--json", str(tmp_path / "plan.json")])
    plan.until(lambda: plan.below("trace_worker"))
    plan.kill()
    assert gone(plan.mark)


@pytest.mark.parametrize("name", ["TERM", "HUP", "INT"])
def test_a_planner_that_is_stopped_removes_its_files_too(start, tmp_path, name):
    plan = start([*PLAN, "--json", str(tmp_path / "plan.json")], XDG_CACHE_HOME=str(tmp_path))
    wanted = 2 if name == "TERM" else 1  # the worker's child, which imported Megatron, or itself
    plan.until(lambda: len(plan.below("trace_worker")) >= wanted)
    assert not no_plan_folder(tmp_path)
    assert plan.stop(name) == 128 + getattr(signal, f"SIG{name}")
    assert "Traceback" not in plan.log.read_text()
    assert gone(plan.mark)
    assert no_plan_folder(tmp_path)


def ranks_of(command: Command) -> list[int]:
    """Those that run their own program: a fork before its exec cannot be stopped and tied."""
    found = []
    for process in command.below():
        with contextlib.suppress(OSError):
            if b"\0LOCAL_RANK=" in Path(f"/proc/{process}/environ").read_bytes():
                found.append(process)
    return found


@pytest.mark.parametrize("name", ["KILL", "TERM", "INT", "HUP"])
def test_a_profile_that_ends_early(start, tmp_path, name):
    profile = start([*PROFILE, "--out", str(tmp_path / "profile")])
    profile.until(lambda: len(ranks_of(profile)) == 2)
    if name == "KILL":
        profile.kill()
    else:
        assert profile.stop(name) in (-getattr(signal, f"SIG{name}"), INTERRUPTED)
        assert "Traceback" not in profile.log.read_text()
    assert gone(profile.mark)


def test_ranks_under_torchrun_when_their_starter_is_killed(start, tmp_path):
    """Once while they import, once while they train."""
    flags = [*TINY, *MOCK, "--train-iters", "1000000"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code = f"""
import os, subprocess, sys
from megatron_mone.common.child_processes import named_here, tied
with open({str(tmp_path / "train.log")!r}, "ab") as log:
    subprocess.run([sys.executable, *{ranks!r}, "-m", "megatron_mone.pretrain", *{flags!r}],
                   stdout=log, stderr=log, env={{**os.environ, **named_here()}}, preexec_fn=tied())
"""
    for trains in (False, True):
        starter = start([sys.executable, "-c", code])
        starter.until(lambda run=starter: len(run.below("megatron_mone.pretrain")) >= 3)
        if trains:
            starter.until(lambda: " 3/" in (tmp_path / "train.log").read_text())
        starter.kill(stops=trains)  # they tie themselves once they have imported
        assert gone(starter.mark)


RANKS = """
import os, time
from pathlib import Path
from tests import training_cases

def test_ranks(tmp_path):
    save = os.environ["SAVE"]
    more = ["--train-iters", "1000000", "--save", save, "--save-interval", "1"]
    case = training_cases.Case("case", tuple([*training_cases.TINY, *training_cases.MOCK, *more]))
    training_cases.run_cases([case], 1, tmp_path)
"""


def test_ranks_of_the_fork_server_when_pytest_is_killed(start, tmp_path):
    """The rank trains and saves."""
    (tmp_path / "test_ranks.py").write_text(RANKS)
    save = tmp_path / "save"
    tests = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "tests.conftest"]
    run = start([*tests, str(tmp_path / "test_ranks.py")], SAVE=str(save))
    run.until((save / "latest_checkpointed_iteration.txt").exists)
    assert len(run.below("forkserver")) >= 3  # the server, a launcher, a rank
    run.kill()
    assert gone(run.mark)


LEFTOVERS = """
import os, subprocess, sys, time
SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]

def test_leaves_processes():
    subprocess.Popen(SLEEP)
    subprocess.Popen(SLEEP, start_new_session=True)
    if not os.fork():
        os.setsid()
        subprocess.Popen(SLEEP)
        time.sleep(600)
    assert os.environ["HOW"] != "fails"
    if os.environ["HOW"] == "waits":
        time.sleep(600)
"""


@pytest.mark.parametrize("how", ["ends", "fails", "waits"])
def test_make_test_ends_what_tests_leave(start, tmp_path, how):
    """At its end, after a failure, and when make is killed."""
    path = tmp_path / "test_leftovers.py"
    path.write_text(LEFTOVERS)
    tests = f"-x -c pyproject.toml -p tests.conftest {path}"
    run = start(["make", "-s", "test", f"TESTS={tests}"], HOW=how)
    if how == "waits":
        run.until(lambda: len(run.below("time.sleep(600)")) >= 3)
        run.process.kill()
    assert run.process.wait(120) == {"ends": 0, "fails": 2, "waits": -signal.SIGKILL}[how]
    assert gone(run.mark)


ROWS = """
import sys
from tests import run as run_tests
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
run_tests.PYTEST, run_tests.ROWS = tuple(sleep), ((), (), ())
sys.argv[1:] = []
sys.exit(run_tests.main())
"""


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "KILL"])
def test_all_rows_of_tests_end_with_their_starter(start, name):
    rows = start([sys.executable, "-c", ROWS])
    rows.until(lambda: len(rows.below("-S -c import time")) == 3)  # not forks before their exec
    if name == "KILL":
        rows.kill()
    else:
        assert rows.stop(name) == 128 + getattr(signal, f"SIG{name}")
    assert gone(rows.mark)
