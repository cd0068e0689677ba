"""Two runs at once never write one checkpoint folder.

Each run is a real one, of one rank or two. Whatever its processes open for writing, make, rename or
remove in the folder they note in a journal, with a time that all processes share: Python's audit
events, also of Megatron and torch, and of their children.
"""

import contextlib
import functools
import importlib
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_mone.checkpoint.integrity import find_damage, read_sums
from megatron_mone.checkpoint.lease.lease import ATTEMPT_VARIABLE, asked_path, lease_path
from megatron_mone.checkpoint.tracker import iterations, read_tracker
from megatron_mone.model.liveness import PROGRESS_VARIABLE
from tests import forked_ranks
from tests.training_cases import MOCK, MONE, TINY, spare_repeated_work

pytestmark = pytest.mark.slow
_WRITES = ("os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
ERROR = re.compile(r"^megatron-mone: error: (.*)$", re.MULTILINE)


def flags(save: Path, *more: str) -> list[str]:
    return [
        *(*TINY, *MONE, *MOCK, "--train-iters", "100000", "--save-interval", "5"),
        *("--save", str(save), "--load", str(save), "--checkpoint-lease-seconds", "3", *more),
    ]


def train(argv: list[str], save: str, journal: str, freezes: str) -> None:
    """One rank of a run, 20 steps a second.

    Args:
        argv: flags of megatron_mone.pretrain.
        save: the folder whose writes are noted.
        journal: file for the notes: a line of `monotonic seconds, event, path`.
        freezes: "MODULE: ATTRIBUTE" of a function before which the process stops itself once.
    """
    from megatron.training import training

    from megatron_mone import pretrain

    notes = os.open(journal, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def note(event: str, details: tuple) -> None:
        if event in _WRITES or (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)):
            path = str(details[1] if event in ("os.link", "os.rename") else details[0])
            if path.startswith(f"{save}/"):
                os.write(notes, f"{time.monotonic()} {event} {path}\n".encode())

    sys.addaudithook(note)
    spare_repeated_work()
    step = training.train_step

    @functools.wraps(step)
    def paced(*args, **kwargs):
        time.sleep(0.05)
        return step(*args, **kwargs)

    training.train_step = paced
    if freezes:
        module, _, path = freezes.partition(": ")
        owner: Any = importlib.import_module(module)
        *owners, name = path.split(".")
        for outer in owners:
            owner = getattr(owner, outer)
        original = getattr(owner, name)

        def frozen(*args):
            setattr(owner, name, original)
            os.kill(os.getpid(), signal.SIGSTOP)
            return original(*args)

        setattr(owner, name, frozen)
    pretrain.main(argv)


class Run:
    """A started run and what is known of it."""

    def __init__(
        self, folder: Path, attempt: str | None, *more: str, ranks: int = 1, freezes: str = ""
    ) -> None:
        self.save, self.name = folder / "save", f"{attempt or 'by-hand'}"
        self.log = folder / f"{self.name}.log"
        self.journal = folder / f"{self.name}.journal"
        self.journal.touch()
        self.progress = folder / f"{self.name}.progress"
        os.environ.update({PROGRESS_VARIABLE: str(self.progress), ATTEMPT_VARIABLE: attempt or ""})
        arguments = (flags(self.save, *more), str(self.save), str(self.journal), freezes)
        self._launch = forked_ranks.start(ranks, train, arguments, self.log)

    def rank(self) -> psutil.Process:
        """The process of rank 0."""
        launcher = psutil.Process(self._launch.pid)
        self.waits_for(launcher.children)
        return min(launcher.children(), key=lambda child: child.pid)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def waits_for(self, condition) -> None:
        """Until `condition()`; fails when the run ends before."""
        deadline = time.monotonic() + 300
        while not condition():
            assert self._launch.poll() is None, self.text()[-3000:]
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.01)

    def saves(self, count: int) -> None:
        """Until it has saved so often."""
        self.waits_for(lambda: self.text().count("successfully saved") >= count)

    def status(self) -> int:
        """The rank's exit status, once it has ended."""
        if self._launch.wait(300) == 0:
            return 0
        ended = re.search(r"^rank \d+ ended with (-?\d+)$", self.text(), re.MULTILINE)
        assert ended is not None, self.text()[-3000:]
        return int(ended[1])

    def writes(self, since: float = 0.0) -> list[str]:
        """`event path` of each write after a moment, paths relative to the folder."""
        lines = (line.split(maxsplit=1) for line in self.journal.read_text().splitlines())
        return [what.replace(f"{self.save}/", "") for at, what in lines if float(at) >= since]

    def took_over_at(self, number: int) -> float:
        """When it made lease `number`."""
        (at,) = (
            float(line.split()[0])
            for line in self.journal.read_text().splitlines()
            if line.endswith(f"os.link {lease_path(self.save, number)}")
        )
        return at

    def end(self) -> None:
        self._launch.kill()
        with contextlib.suppress(psutil.Error):
            self.rank().kill()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ATTEMPT_VARIABLE, "")  # put back, as is the other, at the test's end
    monkeypatch.setenv(PROGRESS_VARIABLE, "")
    runs = []

    def start(attempt: str | None, *more: str, ranks: int = 1, freezes: str = "") -> Run:
        runs.append(Run(tmp_path, attempt, *more, ranks=ranks, freezes=freezes))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def check_whole(save: Path) -> None:
    """Every checkpoint in the folder has the sums of its files; the tracker names the newest."""
    found = iterations(save)
    assert read_tracker(save) == str(found[0])
    for iteration in found:
        folder = save / f"iter_{iteration:07d}"
        entries = read_sums(folder)
        assert entries, folder
        assert find_damage(folder, entries) is None
        assert {path.name for path in folder.iterdir()} == {*entries, "integrity.json"}
    assert not list(save.glob(".saving-*"))


def written(save: Path) -> dict[Path, int]:
    """When each file of the folder was last written."""
    return {path: path.stat().st_mtime_ns for path in save.rglob("*") if path.is_file()}


def saved_by(run: Run) -> set[str]:
    """Names of the checkpoints of which a run wrote anything."""
    return {found[0] for write in run.writes() if (found := re.search(r"iter_\d+", write))}


def test_a_second_run_is_refused_and_the_next_attempt_takes_over(start):
    old = start("42.0", ranks=2)
    old.saves(1)

    other = start("43.0", "--exit-interval", "10")
    assert other.status() == 2
    (line,) = ERROR.findall(other.text())
    pid = old.rank().pid
    assert re.fullmatch(
        rf"checkpoint folder {old.save} is written by attempt 42\.0 \(process {pid} on \S+\), "
        r"alive \d s ago: cancel it, or give another --save",
        line,
    )
    allowed = (".lease-", ".write-check-")
    assert all(write.split()[1].startswith(allowed) for write in other.writes())

    before = old.text().count("successfully saved")
    old.saves(before + 1)
    new = start("42.1", "--exit-interval", "10", ranks=2)
    assert old.status() == 76
    (line,) = ERROR.findall(old.text())
    assert "was asked for by the job's next attempt: attempt 42.0" in line
    assert new.status() == 0, new.text()[-3000:]
    assert "is held by attempt 42.0" in new.text()
    assert old.writes(new.took_over_at(2)) == []
    check_whole(new.save)
    assert saved_by(new)
    assert not saved_by(old) & saved_by(new)
    assert asked_path(new.save, 1).exists() is False
    assert lease_path(new.save, 2).stat().st_mtime == 0
    assert old.progress.exists()


def test_a_frozen_run_that_wakes_writes_nothing(start):
    """Stopped by SIGSTOP between saves; the next attempt cannot ask it and waits for its term."""
    old = start("42.0")
    old.saves(1)
    rank = old.rank()
    rank.suspend()
    new = start("42.1", "--exit-interval", "10")
    assert new.status() == 0, new.text()[-3000:]
    rank.resume()
    assert old.status() == 76
    (line,) = ERROR.findall(old.text())
    assert "was taken over by attempt 42.1" in line
    assert old.writes(new.took_over_at(2)) == []
    check_whole(new.save)
    assert not saved_by(old) & saved_by(new)


@pytest.mark.parametrize(
    ("where", "tries"),
    [
        ("torch.distributed.checkpoint.filesystem: FileSystem.rename", ["/.metadata"]),
        ("megatron_mone.checkpoint.save: sum_files", []),
        ("megatron_mone.checkpoint.aside: publish", []),
    ],
)
def test_a_run_frozen_in_a_save_leaves_it_unnamed(start, where, tries):
    """Its shards are written, not whole, when the next attempt saves the same iteration.

    All that it tries when it wakes is what it was about to do, in a folder that is gone.
    """
    old = start("42.0", freezes=where)
    old.waits_for(lambda: old.rank().status() == psutil.STATUS_STOPPED)
    assert read_tracker(old.save) is None
    (own,) = old.save.glob(".saving-*")
    new = start("42.1", "--exit-interval", "5")
    assert new.status() == 0, new.text()[-3000:]
    assert saved_by(old) == saved_by(new) == {"iter_0000005"}
    before = written(old.save)
    old.rank().resume()
    assert old.status() == 76
    (line,) = ERROR.findall(old.text())
    assert "was taken over by attempt 42.1" in line
    tried = old.writes(new.took_over_at(2))
    assert tried == [f"os.rename {own.name}{path}" for path in tries]
    assert written(old.save) == before
    check_whole(new.save)


def test_a_killed_run_is_resumed_without_waiting(start):
    """On its own machine it is seen that it ended: its term, a minute, does not matter."""
    old = start(None, "--checkpoint-lease-seconds", "3600")
    old.saves(1)
    old.rank().kill()
    assert old.status() == -signal.SIGKILL
    new = start("42.0", "--exit-interval", "10")
    assert new.status() == 0, new.text()[-3000:]
    check_whole(new.save)
