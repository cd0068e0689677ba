"""The holder renews its lease, and knows of its loss before it writes anything."""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mone.checkpoint import ownership
from megatron_mone.checkpoint.lease import keeper as lease_keeper
from megatron_mone.checkpoint.lease import lease
from megatron_mone.checkpoint.lease.keeper import Keeper
from megatron_mone.checkpoint.lease.lease import (
    Holder,
    LeaseLostError,
    asked_path,
    lease_path,
    numbers,
    this_process,
)
from megatron_mone.checkpoint.lease.taking import Contender

NEXT = Holder("42.1", "n4", 99, 5, "another boot", 60.0)


class Hold:
    """A lease held by this process whose thread sleeps; `shift` seconds are added to its clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shift = folder, 0.0
        self.me = this_process(60.0)
        with Contender(folder, self.me) as contender:
            number = contender.take(0.0)
            assert number is not None
            self.keeper = Keeper(folder, number, self.me, contender.touched)

    def taken_by_next(self) -> None:
        """Another attempt takes the next number, as it would once this lease has expired."""
        with Contender(self.folder, NEXT) as contender:
            assert contender.link(self.keeper.number + 1)


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(lease.ATTEMPT_VARIABLE, "42.0")
    held = Hold(tmp_path)
    monkeypatch.setattr(lease_keeper, "clock", lambda: lease.clock() + held.shift)
    yield held
    held.keeper.release()


def mtime(folder: Path, number: int) -> int:
    return lease_path(folder, number).stat().st_mtime_ns


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_the_thread_renews_and_notices_the_loss(tmp_path):
    me = this_process(3.0)
    with Contender(tmp_path, me) as contender:
        assert contender.take(0.0) == 1
        keeper = Keeper(tmp_path, 1, me, contender.touched)
    for _ in range(2):
        before = mtime(tmp_path, 1)
        assert soon(lambda: mtime(tmp_path, 1) > before)  # noqa: B023
    with Contender(tmp_path, NEXT) as contender:
        assert contender.link(2)
    assert soon(lambda: keeper.lost is not None)
    keeper.release()
    assert mtime(tmp_path, 2) != 0


def test_a_look_renews(held):
    os.utime(lease_path(held.folder, 1), (5, 5))
    assert held.keeper.look() is None
    assert mtime(held.folder, 1) > 5e9


def test_the_older_owner_of_a_taken_folder_begins_no_save(held):
    held.taken_by_next()
    with pytest.raises(LeaseLostError) as loss:
        held.keeper.begin_save()
    assert str(loss.value) == (
        f"checkpoint folder {held.folder} was taken over by attempt 42.1 (process 99 on n4): "
        f"attempt 42.0 (process {held.me.pid} on {held.me.host}) stops and writes nothing more"
    )
    assert held.keeper.look() == str(loss.value)


def test_the_loss_is_seen_in_the_midst_of_a_save(held):
    held.keeper.begin_save()
    held.taken_by_next()
    assert "taken over" in (held.keeper.look() or "")


def test_two_takings_later_the_loss_is_seen_too(held):
    """Lease 1 itself is removed by the one who takes number 3."""
    held.taken_by_next()
    os.utime(lease_path(held.folder, 2), (0, 0))
    with Contender(held.folder, replace(NEXT, attempt="42.2")) as contender:
        assert contender.take(0.0) == 3
    assert not lease_path(held.folder, 1).exists()
    assert "attempt 42.2" in (held.keeper.look() or "")


def test_asked_to_leave_it_leaves_at_once(held):
    asked_path(held.folder, 1).touch()
    assert "asked for by the job's next attempt" in (held.keeper.look() or "")
    assert mtime(held.folder, 1) == 0
    with pytest.raises(LeaseLostError):
        held.keeper.begin_save()


def test_asked_during_a_save_it_ends_the_save_first(held):
    held.keeper.begin_save()
    held.keeper.extend_save()  # in the background
    asked_path(held.folder, 1).touch()
    for _ in range(2):
        assert held.keeper.look() is None
        assert mtime(held.folder, 1) != 0
        held.keeper.end_save()
    assert held.keeper.look() is not None
    assert mtime(held.folder, 1) == 0


def test_a_late_holder_takes_the_next_number_itself(held):
    """A newcomer that judged lease 1 expired can no longer take 2: it has one owner."""
    held.shift = 31.0
    assert held.keeper.look() is None
    assert held.keeper.number == 2
    assert numbers(held.folder) == [1, 2]
    with Contender(held.folder, NEXT) as contender:
        assert not contender.link(2)
    assert held.keeper.look() is None
    assert held.keeper.number == 2


def test_a_late_holder_that_comes_second_has_lost(held):
    held.shift = 61.0
    held.taken_by_next()
    assert "taken over by attempt 42.1" in (held.keeper.look() or "")
    assert numbers(held.folder) == [1, 2]


def test_frozen_in_a_look_it_looks_again(held, monkeypatch):
    """Stopped after it listed the numbers: when it wakes, the list is old."""
    listed = lease_keeper.numbers
    frozen = []

    def freeze(folder: Path, kind: str = "json") -> list[int]:
        found = listed(folder, kind)
        if not frozen:
            frozen.append(True)
            held.shift = 61.0
            held.taken_by_next()
        return found

    monkeypatch.setattr(lease_keeper, "numbers", freeze)
    with pytest.raises(LeaseLostError, match=r"taken over by attempt 42\.1"):
        held.keeper.begin_save()


@pytest.mark.parametrize("shift", [0.0, 31.0])
def test_a_lease_that_was_removed_is_lost(held, shift):
    """By a person, with all others: nobody can know who holds the folder."""
    lease_path(held.folder, 1).unlink()
    asked_path(held.folder, 1).touch()
    held.shift = shift
    assert "lost its lease file" in (held.keeper.look() or "")
    assert numbers(held.folder) == []


def test_a_file_server_that_fails_for_a_while_costs_nothing(held, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "utime", fail)
        with pytest.raises(OSError, match="Input/output"):
            held.keeper.begin_save()
    held.shift = 45.0
    held.keeper.begin_save()
    assert held.keeper.number == 2


def test_released_at_the_end(held):
    held.keeper.release()
    assert mtime(held.folder, 1) == 0


def test_a_lost_lease_is_not_released_for_its_new_owner(held):
    held.taken_by_next()
    before = mtime(held.folder, 1)
    held.keeper.release()
    assert (mtime(held.folder, 1) == before, mtime(held.folder, 2) != 0) == (True, True)


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("3", 3), ("60", 60), ("3600", 3600)])
def test_terms_that_are_accepted(text, seconds):
    parser = argparse.ArgumentParser()
    ownership.add_arguments(parser)
    args = parser.parse_args(["--checkpoint-lease-seconds", text], argparse.Namespace(save="x"))
    assert args.checkpoint_lease_seconds == seconds
    assert ownership.is_leased(args) is (seconds > 0)
    args.save = "msc://bucket/x"
    assert not ownership.is_leased(args)


@pytest.mark.parametrize("text", ["1", "-5", "3601", "nan", "inf", "x", ""])
def test_terms_that_are_refused(text, capsys):
    parser = argparse.ArgumentParser()
    ownership.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--checkpoint-lease-seconds={text}"])
    said = capsys.readouterr().err
    assert f"checkpoint_lease_seconds = {text} is not 3 to 3600 seconds: give such" in said
