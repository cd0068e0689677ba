"""Who may write a checkpoint folder: whoever made the lease file with the highest number in it.

    .lease-000001.json    {"attempt": "42.0", "host": "n3", "pid": 123, ..., "seconds": 60}
    .lease-000001.asked   the next attempt of the same job wants the folder

A lease is taken by making the next number, exclusively: the file is written beside and then hard
linked, which is atomic on local disks, NFS and Lustre. The number is a fencing token: the holder of
N has lost as soon as N + 1 exists, so the highest number is never removed. Its holder renews the
file's modification time (keeper.py); one of 0 says that the lease was released, which needs
no space on a full disk. Its age is the difference of two times of the file server, the lease's and
that of a file just touched beside it; this machine's clock only measures how long it was watched.

A newcomer (taking.py) takes the folder when there is no lease; when the lease is released or
older than its holder's term; when its holder ran in this process-id namespace and is gone. An older
attempt of the same job is asked to leave. Any other is watched for a sign of life, and then the
newcomer gives up.

What holds: at most one process holds the highest number; a holder looks at the numbers before a
save touches the folder, at every stage of it and before the tracker moves; a frozen one looks when
it wakes. Storage knows no tokens: between a look and the write that follows it a process may freeze
for longer than the term, and ranks that outlive rank 0, or are inside a shard, go on writing it. So
a torch_dist save writes under a name that no other process has (aside.py), and what it does to
names that others have is a rename that fails after a newer attempt's, or is undone when the look
that follows tells of one. What does not hold: until it is undone, a moment, the newer checkpoint of
that iteration is under another name, and a process killed in that moment leaves it there; between
the staging of the tracker and its rename a newer attempt's may get the older text; other formats
than torch_dist write in place. May touch: `.lease-*` files of a checkpoint folder, read-only.
"""

import errno
import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_SECONDS = 60.0
SHORTEST_SECONDS, LONGEST_SECONDS = 3.0, 3600.0
ATTEMPT_VARIABLE = "MEGATRON_MONE_ATTEMPT"
_NAME = re.compile(r"\.lease-(\d{6,})\.(json|asked)")
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # one that runs in a suspended VM
_VANISHED = (errno.ENOENT, errno.ESTALE)


class LeaseLostError(Exception):
    """This attempt may write nothing more: one line that names the folder and who has it now."""


@dataclass(frozen=True)
class Holder:
    """A process that may write a checkpoint folder, as its lease describes it."""

    attempt: str | None
    """JOB.RESTART as 42.1; None for a run that no launcher started."""
    host: str
    pid: int
    started: int
    """When the process started, in clock ticks after boot; 0 where that is not known."""
    machine: str
    """Boot and process-id namespace in which `pid` is meant; "" where that is not known."""
    seconds: float
    """Term: a lease that was not renewed for so long has expired."""

    def __str__(self) -> str:
        process = f"process {self.pid} on {self.host}"
        text = process if self.attempt is None else f"attempt {self.attempt} ({process})"
        return " ".join(text.split())


@dataclass(frozen=True)
class Found:
    """The lease with the highest number."""

    number: int
    holder: Holder
    mtime_ns: int
    """File server's time of the last renewal; 0 once it is released."""


def clock() -> float:
    """Seconds that only grow, also while this process is stopped or its machine suspended."""
    return time.clock_gettime(_CLOCK)


def this_process(seconds: float) -> Holder:
    """This process as a holder with a term of `seconds`."""
    pid = os.getpid()
    seen = _state_and_start(pid)
    return Holder(
        attempt=os.environ.get(ATTEMPT_VARIABLE) or None,
        host=socket.gethostname(),
        pid=pid,
        started=0 if seen is None else seen[1],
        machine=_machine(),
        seconds=seconds,
    )


def lease_path(folder: Path, number: int) -> Path:
    """Where lease `number` of a checkpoint folder is."""
    return folder / f".lease-{number:06d}.json"


def asked_path(folder: Path, number: int) -> Path:
    """The file that asks the holder of lease `number` to leave."""
    return folder / f".lease-{number:06d}.asked"


def numbers(folder: Path, kind: str = "json") -> list[int]:
    """Numbers of the leases in a folder, ascending; of `kind` "asked": of those asked for.

    Lists the folder, which an NFS client asks the server for; a look-up by name may be answered
    from its cache of names that did not exist. Raises OSError.
    """
    names = os.listdir(folder)  # noqa: PTH208, a Path for each of many checkpoints costs more
    found = map(_NAME.fullmatch, names)
    return sorted(int(match[1]) for match in found if match and match[2] == kind)


def newest(folder: Path) -> Found | None:
    """The lease that counts, None where there is none yet. Raises OSError."""
    for tries_left in range(9, -1, -1):
        found = numbers(folder)
        if not found:
            return None
        try:
            with lease_path(folder, found[-1]).open(encoding="utf-8", errors="replace") as file:
                mtime_ns = os.fstat(file.fileno()).st_mtime_ns
                return Found(found[-1], _parse(file.read()), mtime_ns)
        except OSError as error:
            # Removed since the listing, which happens when two higher ones were made.
            if error.errno not in _VANISHED or not tries_left:
                raise
    raise AssertionError("unreachable")


def _parse(text: str) -> Holder:
    """The holder in a lease file; one of which nothing is known if the file is damaged."""
    try:
        value: Any = json.loads(text)
        attempt, host = value["attempt"], str(value["host"])
        pid, started = int(value["pid"]), int(value["started"])
        seconds = float(value["seconds"])
        if not (0 < pid < 2**31 and SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS):
            raise ValueError("not written by this program")
        name = None if attempt is None else str(attempt)
        return Holder(name, host, pid, started, str(value["machine"]), seconds)
    except (ValueError, KeyError, TypeError):
        return Holder("unknown", "an unknown host", 0, 0, "", DEFAULT_SECONDS)


def is_older_attempt(one: str | None, other: str | None) -> bool:
    """Whether `one` is an earlier attempt of the job that `other` is one of: 42.0 before 42.1."""
    job, _, restart = (one or "").rpartition(".")
    other_job, _, other_restart = (other or "").rpartition(".")
    if not (job == other_job and restart.isdecimal() and other_restart.isdecimal()):
        return False
    return int(restart) < int(other_restart)


def is_gone(holder: Holder, me: Holder) -> bool:
    """Whether `holder` is known to have ended: only `me` beside it, on one machine, can tell."""
    if not me.machine or (holder.host, holder.machine) != (me.host, me.machine):
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, alive
    seen = _state_and_start(holder.pid)
    if seen is None or not holder.started:  # hidden from this user
        return False
    state, started = seen
    return state in "ZX" or started != holder.started


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """(state letter, start in clock ticks after boot) of proc(5); None where it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the program's name may hold spaces and brackets
    return fields[0], int(fields[19])


def _machine() -> str:
    """Boot and process-id namespace of this process, "" where /proc does not tell.

    Two containers on one machine have one boot id, and each a process 7.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # noqa: PTH115
            return ""  # /proc is that of another namespace
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return ""
