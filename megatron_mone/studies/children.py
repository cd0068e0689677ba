"""Child processes of a study: as many at a time as there are cores, each with a log of its own, and
none left when the study stops. May touch: child processes, their logs."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from launch.runs.kept_runs import TrainingError
from megatron_mone.common.child_processes import tied
from megatron_mone.common.local_ranks import error_line, last_lines
from megatron_mone.common.machine import cores


class Children:
    """Processes under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def run(self, words: Sequence[str], log: Path) -> None:
        """Run this interpreter with `words` to its end, with one thread of arithmetic.

        Raises:
            TrainingError: it failed; its last words are in the message, and `log` is kept.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._lock:
            if self._stopped:
                raise TrainingError(f"{log.stem} was not started")
            with log.open("wb") as file:
                child = subprocess.Popen(
                    [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT,
                    env=environment, preexec_fn=tied(),
                )  # fmt: skip
            self._running.append(child)
        status = child.wait()
        with self._lock:
            self._running.remove(child)
        if status:
            said = error_line([log]) or last_lines(log)
            raise TrainingError(f"{log.stem}: {said}\nlog: {os.path.relpath(log)}")
        log.unlink()

    def stop(self) -> None:
        """Ask all to save and end, and wait for them."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for child in running:
            child.send_signal(signal.SIGTERM)
        for child in running:
            child.wait()


def all_of[T](
    todo: Sequence[T], do: Callable[[T, Children], None], done: Callable[[T], None], at_a_time: int
) -> None:
    """Do each, several at a time.

    Args:
        todo: of any kind.
        do: one of them, by children alone.
        done: told each that is done, in this thread.
        at_a_time: processes of a core each.

    Raises:
        BaseException: the first that failed, or a stop; those under way were stopped.
    """
    children = Children()
    with ThreadPoolExecutor(max(1, min(at_a_time, cores()))) as pool:
        under_way = {pool.submit(do, one, children): one for one in todo}
        try:
            while under_way:
                ended, _ = wait(under_way, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in ended:
                    one = under_way.pop(future)
                    future.result()
                    done(one)
        except BaseException:  # before the pool waits for its threads, and they for the children
            for future in under_way:
                future.cancel()
            children.stop()
            raise
