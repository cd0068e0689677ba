"""Which rank says a failure: one of each start, however many starts a process makes."""

import time
from pathlib import Path

from megatron_mone.model import failure


def test_ranks_of_one_start_say_a_line_once(tmp_path: Path, capsys):
    log = tmp_path / "failure.log"
    failure.begin()
    assert failure.say_once("x = 1 is wrong", 2, log) == 2
    assert failure.say_once("what follows from it", 1, log) == 2  # the status of who said it
    assert capsys.readouterr().err == "megatron-mone: error: x = 1 is wrong\n"


def test_a_start_is_not_silent_because_one_before_it_failed(tmp_path: Path, capsys):
    """A shell that starts ranks again and again is the parent of them all, and names their log."""
    log = tmp_path / "failure.log"
    for status, said in ((2, "x = 1 is wrong"), (74, "the disk is full")):
        time.sleep(0.03)  # more than a tick of the kernel's clock for files
        failure.begin()
        assert failure.say_once(said, status, log) == status
        assert capsys.readouterr().err == f"megatron-mone: error: {said}\n"
    assert log.read_text().startswith("74 (rank ")
