"""Who still runs: processes found by a mark in the environment they started with.

A process keeps it through fork, through exec, in other sessions and after its parents have ended.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

_POLL_SECONDS = 0.05
_TRACKER = "multiprocessing.resource_tracker"
_TRACKER_SECONDS = 10.0


def new_mark() -> dict[str, str]:
    """A variable that no other process has."""
    return {f"MARK_{uuid.uuid4().hex}": "1"}


def marked(mark: dict[str, str]) -> dict[int, str]:
    """{process id: command line} of the processes, zombies left out, whose environment holds it."""
    ((name, value),) = mark.items()
    wanted, found = f"{name}={value}".encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                words = (process / "cmdline").read_bytes().split(b"\0")
                found[int(process.name)] = b" ".join(words).decode(errors="replace").strip()
    return found


def gone(mark: dict[str, str], seconds: float = 60.0) -> bool:
    """Whether all with the mark end in time; those that do not are named, and killed."""
    deadline = time.monotonic() + seconds
    while found := marked(mark):
        if time.monotonic() > deadline:
            print(f"left behind: {found}", file=sys.stderr)
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return False
        time.sleep(_POLL_SECONDS)
    return True


def end(mark: dict[str, str]) -> None:
    """Kill all with the mark, and those they start meanwhile.

    Resource trackers are left: they remove semaphores and shared memory once all others are gone.
    """
    while found := [pid for pid, command in marked(mark).items() if _TRACKER not in command]:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(_POLL_SECONDS / 5)


class Keeper:
    """A process that ends what a run of the tests left running, once that run has ended.

    Tests start commands that are not tied to them; when the tests are killed, nobody ends those.
    """

    def __init__(self) -> None:
        self._mark = new_mark()
        environment = dict(os.environ)  # its own has no mark
        os.environ.update(self._mark)
        command = [sys.executable, "-S", __file__, str(os.getpid()), *self._mark]
        with open(os.devnull, "r+b") as nowhere:  # noqa: PTH123
            self._process = subprocess.Popen(
                command, stdin=nowhere, stdout=nowhere, stderr=nowhere, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        """End what is left now."""
        end(self._mark)
        self._process.kill()
        self._process.wait()


def _keep(tests: int, mark: dict[str, str]) -> None:
    """Wait for the tests to end, then end what they left."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(tests)], [], [])  # readable when the process ends
    end(mark)
    gone(mark, _TRACKER_SECONDS)


if __name__ == "__main__":
    _keep(int(sys.argv[1]), {sys.argv[2]: "1"})
