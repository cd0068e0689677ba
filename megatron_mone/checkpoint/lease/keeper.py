"""The holder's side of a lease: a thread that renews it and notices when it is lost or asked for.

A holder that could not renew for half its term (it was frozen, or the file server was) cannot know
whether a newcomer is about to take the next number. It takes that number itself, or has lost. May
touch: `.lease-*` files of a checkpoint folder; one daemon thread.
"""

import contextlib
import os
import threading
from pathlib import Path

from megatron_mone.checkpoint.lease.lease import (
    Holder,
    LeaseLostError,
    clock,
    lease_path,
    newest,
    numbers,
)
from megatron_mone.checkpoint.lease.taking import Candidate

RENEWALS_PER_TERM = 6


class Keeper:
    """Keeps lease `number` of a folder until it is released or lost.

    Args:
        folder: the checkpoint folder.
        number: of the lease, which this process has just taken.
        me: what the lease says of this process.
        renewed: `lease.clock()` just before the lease file was touched last.

    Attributes:
        lost: why nothing may be written any more; None while this process holds the folder.
        number: of the lease held now; greater than at first when the holder was late.
    """

    def __init__(self, folder: Path, number: int, me: Holder, renewed: float) -> None:
        self.number = number
        self.lost: str | None = None
        self._folder, self._me, self._renewed = folder, me, renewed
        self._saves = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tend, name="checkpoint lease", daemon=True)
        self._thread.start()

    def look(self) -> str | None:
        """Renew and look for other numbers now; returns `lost`. Raises OSError."""
        with self._lock:
            self._look()
        return self.lost

    def begin_save(self) -> None:
        """Look, and keep the folder until `end_save` though another attempt asks for it.

        Raises:
            LeaseLostError: the folder is not this process's to write.
            OSError: it cannot be known.
        """
        with self._lock:
            self._look()
            if self.lost is not None:
                raise LeaseLostError(self.lost)
            self._saves += 1

    def extend_save(self) -> None:
        """The save under way goes on in the background: one more `end_save` will end it."""
        with self._lock:
            self._saves += 1

    def end_save(self) -> None:
        """Nothing of the save under way will be written any more."""
        with self._lock:
            self._saves -= 1

    def release(self) -> None:
        """Let the next run take the folder without waiting; does nothing when it is lost.

        Raises OSError; the lease then expires.
        """
        self._ended.set()
        self._thread.join()
        if self.lost is None and self._is_highest():
            self._let_go()

    def _tend(self) -> None:
        while self.lost is None and not self._ended.wait(self._me.seconds / RENEWALS_PER_TERM):
            try:
                self.look()
            except OSError:
                continue  # not renewed: `_look` knows when it is too late

    def _look(self) -> None:
        if self.lost is None:
            self._renew()
        while self.lost is None and self._is_late():  # frozen since its first line
            self._renew()

    def _is_late(self) -> bool:
        return clock() - self._renewed > self._me.seconds / 2

    def _renew(self) -> None:
        started = clock()
        if not self._is_late():
            with contextlib.suppress(FileNotFoundError):  # then another number is the highest
                os.utime(lease_path(self._folder, self.number))
        elif self._is_highest():
            with Candidate(self._folder, self._me) as candidate:
                candidate.touch()
                if candidate.link(self.number + 1):
                    self.number += 1
        if not self._is_highest():
            taker = newest(self._folder)
            what = "lost its lease file" if taker is None else f"was taken over by {taker.holder}"
            self.lost = self._say(what)
        elif self._saves == 0 and self.number in numbers(self._folder, "asked"):
            self._let_go()
            self.lost = self._say("was asked for by the job's next attempt")
        else:
            self._renewed = started

    def _is_highest(self) -> bool:
        return max(numbers(self._folder), default=0) == self.number

    def _let_go(self) -> None:
        os.utime(lease_path(self._folder, self.number), (0, 0))

    def _say(self, what: str) -> str:
        return f"checkpoint folder {self._folder} {what}: {self._me} stops and writes nothing more"
