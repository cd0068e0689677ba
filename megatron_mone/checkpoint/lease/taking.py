"""How a process takes the lease of a checkpoint folder: the rules, and the exclusive link.

May touch: `.lease-*` files of a checkpoint folder.
"""

import enum
import json
import os
import secrets
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Self

from megatron_mone.checkpoint.lease.lease import (
    Found,
    Holder,
    asked_path,
    clock,
    is_gone,
    is_older_attempt,
    lease_path,
    newest,
    numbers,
)
from megatron_mone.common.files import sync_file


class Decision(enum.Enum):
    """What a newcomer does about a lease."""

    TAKE = enum.auto()
    ASK = enum.auto()
    WATCH = enum.auto()
    REFUSE = enum.auto()


def decide(found: Found | None, me: Holder, idle: float, renewed: bool) -> Decision:
    """What to do about a lease.

    Args:
        found: the lease; None where there is none.
        me: who wants the folder.
        idle: seconds for which the lease was not renewed.
        renewed: it was renewed while `me` watched.
    """
    if found is None or found.mtime_ns == 0 or idle > found.holder.seconds:
        return Decision.TAKE
    if is_gone(found.holder, me):
        return Decision.TAKE
    if is_older_attempt(found.holder.attempt, me.attempt):
        return Decision.ASK
    return Decision.REFUSE if renewed else Decision.WATCH


class Candidate:
    """A lease file without a number: touched, it tells the file server's time; linked, it holds.

    Args:
        folder: the checkpoint folder, which exists.
        me: what the file says.

    Attributes:
        touched: `clock()` before the last touch.
    """

    def __init__(self, folder: Path, me: Holder) -> None:
        self._folder = folder
        self._path = folder / f".lease-{secrets.token_hex(8)}.tmp"
        self.touched = clock()
        with self._path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(me), indent=1) + "\n")
        sync_file(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._path.unlink(missing_ok=True)

    def touch(self) -> int:
        """The file server's time in nanoseconds. Raises OSError."""
        self.touched = clock()
        os.utime(self._path)
        return self._path.stat().st_mtime_ns

    def link(self, number: int) -> bool:
        """Take lease `number`; whether this is the holder now. Raises OSError.

        The numbers below its predecessor's are removed: nobody's any more.
        """
        path = lease_path(self._folder, number)
        try:
            os.link(self._path, path)
        except FileExistsError:
            # An answer of an NFS server may get lost, and the repeated call finds the first one's
            # link. Opening asks the server for the count.
            with self._path.open() as file:
                if os.fstat(file.fileno()).st_nlink == 1:
                    return False
        if max(numbers(self._folder), default=0) != number:  # frozen since it was judged free
            path.unlink(missing_ok=True)
            return False
        sync_file(self._folder)
        for other in numbers(self._folder, "asked"):
            if other < number:
                asked_path(self._folder, other).unlink(missing_ok=True)
        for other in numbers(self._folder):
            if other < number - 1:
                lease_path(self._folder, other).unlink(missing_ok=True)
        return True


class Contender(Candidate):
    """A process that wants the folder. Call `take` until it has it."""

    def __init__(self, folder: Path, me: Holder) -> None:
        super().__init__(folder, me)
        self._me = me
        self._seen: Found | None = None
        self._seen_at = clock()
        self._renewed = False

    def take(self, patience: float) -> int | None:
        """Try for `patience` seconds.

        Returns:
            The number of the lease that this process now holds; None while it has to wait.

        Raises:
            ValueError: another run holds the folder and lives; one line.
            OSError: the folder cannot be read or written.
        """
        deadline = clock() + patience
        while (number := self._try()) is None and clock() < deadline:
            time.sleep(min(0.5, self._me.seconds / 20))
        return number

    def _try(self) -> int | None:
        now = self.touch()
        found = newest(self._folder)
        known = self._seen
        if found is None or known is None or found.number != known.number:
            self._renewed = False
        elif found.mtime_ns != known.mtime_ns:
            self._renewed = True
        if found != known:
            self._seen, self._seen_at = found, clock()
        # A file server whose clock was set back makes a lease look young for long.
        watched = clock() - self._seen_at
        idle = watched if found is None else max(watched, (now - found.mtime_ns) / 1e9)
        decision = decide(found, self._me, idle, self._renewed)
        if decision is Decision.TAKE:
            number = 1 if found is None else found.number + 1
            return number if self.link(number) else None
        assert found is not None
        if decision is Decision.REFUSE:
            raise ValueError(
                f"checkpoint folder {self._folder} is written by {found.holder}, alive "
                f"{max(0.0, idle):.0f} s ago: cancel it, or give another --save"
            )
        if known is None or known.number != found.number:
            self._tell(found, decision)
        if decision is Decision.ASK:
            self._ask(found.number)
        return None

    def _ask(self, number: int) -> None:
        try:
            with asked_path(self._folder, number).open("x", encoding="utf-8") as file:
                file.write(self._me.attempt or "")
        except FileExistsError:
            pass

    def _tell(self, found: Found, decision: Decision) -> None:
        until = "it has left" if decision is Decision.ASK else "it shows whether it is alive"
        print(
            f"megatron-mone: checkpoint folder {self._folder} is held by {found.holder}: waiting "
            f"until {until}, or has not renewed its lease for {found.holder.seconds:g} s",
            file=sys.stderr,
            flush=True,
        )
