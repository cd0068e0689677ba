"""One helper draws every bar: on a terminal, and nowhere else."""

import io
import re

from megatron_mone.common.progress import NOTE, WHAT, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO) -> str:
    with progress_bar(WHAT, "bar", "count", NOTE, first=None, stream=stream) as bar:
        bar(None, 9, "later", bar="later")
        bar(0, None, "steps")
        bar(3, 7, "steps", note="loss 1.25")
        assert bar.drawn is stream.isatty()
    return stream.getvalue()


def test_a_terminal_shows_what_how_far_and_the_note(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn(Terminal()))
    assert {"steps", "3/7", "loss", "1.25", "later", "0/9"} <= set(shown.split())


def test_a_file_shows_nothing():
    assert drawn(io.StringIO()).strip() == ""
