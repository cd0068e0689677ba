"""A newcomer takes a checkpoint folder exactly when its holder cannot be writing it."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_mone.checkpoint.lease import lease
from megatron_mone.checkpoint.lease import taking as lease_taking
from megatron_mone.checkpoint.lease.lease import (
    Found,
    Holder,
    asked_path,
    is_gone,
    is_older_attempt,
    lease_path,
    newest,
    numbers,
    this_process,
)
from megatron_mone.checkpoint.lease.taking import Candidate, Contender, Decision, decide

ELSEWHERE = Holder("41.0", "n3", 123, 5, "another boot", 60.0)


@pytest.fixture
def me(monkeypatch: pytest.MonkeyPatch) -> Holder:
    monkeypatch.setenv(lease.ATTEMPT_VARIABLE, "42.1")
    return this_process(60.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The process's clock: item 0. Sleeping moves it on."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(lease_taking, "clock", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    return now


def put(folder: Path, number: int, holder: Holder, age: float = 0.0) -> Path:
    """A lease that its holder renewed `age` seconds ago by the clock of the file system."""
    path = lease_path(folder, number)
    path.write_text(json.dumps(asdict(holder)))
    renewed = path.stat().st_mtime - age
    os.utime(path, (renewed, renewed))
    return path


def take(folder: Path, me: Holder, patience: float = 0.0) -> int | None:
    with Contender(folder, me) as contender:
        return contender.take(patience)


def test_an_empty_folder_is_taken(tmp_path, me):
    assert take(tmp_path, me) == 1
    found = newest(tmp_path)
    assert found is not None
    assert found.holder == me
    assert (me.attempt, me.pid) == ("42.1", os.getpid())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lease-000001.json"]


def test_a_released_lease_is_taken_and_the_one_before_the_last_is_removed(tmp_path, me):
    """The highest number stays for good, else numbering would begin again."""
    for number in (1, 2, 3, 4):
        assert take(tmp_path, me) == number
        asked_path(tmp_path, number).touch()
        os.utime(lease_path(tmp_path, number), (0, 0))
        assert numbers(tmp_path) == [n for n in (number - 1, number) if n]
        assert numbers(tmp_path, "asked") == [number]


@pytest.mark.parametrize(("age", "taken"), [(55, None), (65, 2), (1e6, 2)])
def test_age_is_measured_on_the_file_system_s_clock(tmp_path, me, monkeypatch, age, taken):
    put(tmp_path, 1, ELSEWHERE, age)
    monkeypatch.setattr(time, "time", lambda: 12345.0)  # of a machine whose clock is wrong
    assert take(tmp_path, me) == taken


def test_the_term_is_the_holder_s(tmp_path, me):
    put(tmp_path, 1, replace(ELSEWHERE, seconds=600.0), 300)
    assert take(tmp_path, replace(me, seconds=3.0)) is None


def test_a_lease_from_the_future_expires_too(tmp_path, me, clock):
    """The file server's clock was set back by an hour: only watching tells."""
    put(tmp_path, 1, ELSEWHERE, -3600)
    assert take(tmp_path, me, patience=ELSEWHERE.seconds - 5) is None
    assert take(tmp_path, me, patience=ELSEWHERE.seconds + 5) == 2


def test_another_run_that_renews_is_refused_in_one_line(tmp_path, me, clock, monkeypatch, capfd):
    path = put(tmp_path, 1, ELSEWHERE, 20)

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 1005:
            os.utime(path)

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(ValueError) as refusal:
        take(tmp_path, me, patience=100)
    assert str(refusal.value) == (
        f"checkpoint folder {tmp_path} is written by attempt 41.0 (process 123 on n3), alive 0 s "
        "ago: cancel it, or give another --save"
    )
    assert numbers(tmp_path) == [1]
    assert capfd.readouterr().err.count("waiting until it shows whether it is alive") == 1


def test_another_run_that_is_silent_is_waited_for(tmp_path, me, clock):
    """A chain of jobs: the one before was killed a moment ago and cannot be asked."""
    put(tmp_path, 1, ELSEWHERE, 20)
    assert take(tmp_path, me, patience=30) is None
    # The file system's clock does not follow this test's: the time watched counts.
    assert take(tmp_path, me, patience=61) == 2


def test_an_older_attempt_is_asked_and_waited_for(tmp_path, me, clock, monkeypatch, capfd):
    path = put(tmp_path, 7, replace(ELSEWHERE, attempt="42.0"))

    def leave(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 1010:
            assert asked_path(tmp_path, 7).read_text() == "42.1"
            os.utime(path, (0, 0))
        else:
            os.utime(path)  # alive; never a reason to refuse

    monkeypatch.setattr(time, "sleep", leave)
    assert take(tmp_path, me, patience=100) == 8
    assert capfd.readouterr().err == (
        f"megatron-mone: checkpoint folder {tmp_path} is held by attempt 42.0 (process 123 on n3): "
        "waiting until it has left, or has not renewed its lease for 60 s\n"
    )


@pytest.mark.parametrize(
    ("one", "other", "older"),
    [
        ("42.0", "42.1", True),
        ("42.9", "42.10", True),
        ("42_3.0", "42_3.1", True),
        ("local-1763-123.0", "local-1763-123.1", True),
        ("42.1", "42.1", False),
        ("42.2", "42.1", False),
        ("41.0", "42.1", False),
        ("42_3.0", "42.1", False),
        ("42.x", "42.1", False),
        (None, "42.1", False),
        ("42.0", None, False),
        (None, None, False),
    ],
)
def test_attempts_of_one_job_have_an_order(one, other, older):
    assert is_older_attempt(one, other) is older


def test_verdicts(me):
    def decision(
        holder: Holder, idle: float = 1.0, renewed: bool = False, mtime: int = 5
    ) -> Decision:
        return decide(Found(3, holder, mtime), me, idle, renewed)

    older = replace(ELSEWHERE, attempt="42.0")
    assert decide(None, me, 0.0, False) is Decision.TAKE
    assert decision(ELSEWHERE, mtime=0) is Decision.TAKE
    assert decision(ELSEWHERE, idle=60.1) is Decision.TAKE
    assert decision(ELSEWHERE, idle=59.9) is Decision.WATCH
    assert decision(ELSEWHERE, renewed=True) is Decision.REFUSE
    assert decision(older) is decision(older, renewed=True) is Decision.ASK
    assert decision(older, idle=60.1) is Decision.TAKE
    assert decision(replace(ELSEWHERE, attempt="42.2"), renewed=True) is Decision.REFUSE
    assert decision(replace(ELSEWHERE, attempt=None), renewed=True) is Decision.REFUSE


def test_a_process_that_ended_on_this_machine_is_gone(tmp_path, me):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = lease._state_and_start(process.pid)
    assert seen is not None
    other = replace(me, pid=process.pid, started=seen[1])
    assert not is_gone(me, me)
    assert not is_gone(other, me)
    assert is_gone(replace(other, started=other.started - 1), me)  # the number was given again
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(other, me)  # a zombie writes nothing
    process.wait()
    assert is_gone(other, me)
    put(tmp_path, 1, other)
    assert take(tmp_path, me) == 2
    for elsewhere in ({"machine": "this boot, another namespace"}, {"host": "n4"}, {"machine": ""}):
        assert not is_gone(replace(other, **elsewhere), me)
    assert not is_gone(replace(other, machine=""), replace(me, machine=""))


def test_another_user_s_process_is_not_gone(me, monkeypatch):
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(lease, "_state_and_start", lambda pid: None)  # mounted with hidepid
    assert not is_gone(replace(me, pid=1, started=7), me)


def test_the_namespace_counts(me):
    """In a box of its own a process has the same boot id, and a number that others have too."""
    code = "from megatron_mone.checkpoint.lease.lease import this_process as t; print(t(3).machine)"
    box = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    shown = subprocess.run(box, capture_output=True, text=True, check=False)
    if shown.returncode:
        pytest.skip("this user may not make namespaces")
    machine = shown.stdout.strip()
    assert machine.split()[0] == me.machine.split()[0]
    assert machine != me.machine


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attempt": 1}', '{"pid": "x"}'])
def test_a_damaged_lease_holds_until_it_expires(tmp_path, me, text):
    path = lease_path(tmp_path, 3)
    path.write_text(text)
    assert take(tmp_path, me) is None
    long_ago = path.stat().st_mtime - lease.DEFAULT_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    assert take(tmp_path, me) == 4


@pytest.mark.parametrize(
    "changes", [{"pid": -1}, {"pid": 2**40}, {"seconds": float("nan")}, {"seconds": 1e9}]
)
def test_a_lease_of_impossible_numbers_counts_as_damaged(tmp_path, changes):
    put(tmp_path, 1, replace(ELSEWHERE, **changes))
    found = newest(tmp_path)
    assert found is not None
    assert found.holder.attempt == "unknown"
    assert found.holder.seconds == lease.DEFAULT_SECONDS


def _contend(folder: Path, rounds: int, barrier, winners) -> None:
    me = replace(this_process(60.0), machine="")  # so that none knows the others to be its kin
    for number in range(1, rounds + 1):
        with Contender(folder, me) as contender:
            barrier.wait()
            if contender.take(0.0) is not None:
                winners.put((number, os.getpid()))
            barrier.wait()
        if newest(folder).holder.pid == os.getpid():  # type: ignore[union-attr]
            os.utime(lease_path(folder, number), (0, 0))
        barrier.wait()


def test_of_many_contenders_one_wins(tmp_path):
    """Eight processes, thirty times: each number has one owner, and the file names it."""
    rounds, count = 30, 8
    context = multiprocessing.get_context("fork")
    barrier, winners = context.Barrier(count, timeout=300), context.Queue()
    processes = [
        context.Process(target=_contend, args=(tmp_path, rounds, barrier, winners))
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    won = sorted(winners.get(timeout=300) for _ in range(rounds))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert winners.empty()
    assert [number for number, _ in won] == list(range(1, rounds + 1))
    assert numbers(tmp_path) == [rounds - 1, rounds]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_number_that_was_passed_by_is_not_taken(tmp_path, me):
    """A contender frozen between judging and linking finds its number free again, and too low."""
    put(tmp_path, 4, ELSEWHERE)
    put(tmp_path, 5, ELSEWHERE)
    with Candidate(tmp_path, me) as candidate:
        assert not candidate.link(2)
    assert numbers(tmp_path) == [4, 5]


def test_an_answer_that_was_lost_is_no_defeat(tmp_path, me, monkeypatch):
    """The NFS client repeats the call and is told that the name exists: its own."""
    link = os.link

    def twice(*args) -> None:
        link(*args)
        link(*args)

    monkeypatch.setattr(os, "link", twice)
    with Candidate(tmp_path, me) as candidate:
        assert candidate.link(1)


def test_a_lease_removed_while_it_is_read_is_looked_for_again(tmp_path, me, monkeypatch):
    put(tmp_path, 1, ELSEWHERE)
    put(tmp_path, 2, me)
    listings = iter([[1], [1, 2], [2]])
    lease_path(tmp_path, 1).unlink()
    monkeypatch.setattr(lease, "numbers", lambda folder: next(listings))
    found = newest(tmp_path)
    assert found is not None
    assert found.number == 2
