"""WorkerPool: requests answered by children of one server process, a few at a time.

The server (trace_worker.py) imports Megatron, which takes seconds, and then forks a child for each
request, which takes milliseconds. May touch: that process; files in the folder it is given.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_mone.common.child_processes import tied
from megatron_mone.common.exit_status import USER_ERROR
from megatron_mone.common.places import ROOT
from megatron_mone.planning.tracing.trace_worker import LONGEST_MESSAGE

_LOG_TAIL = 4000


@dataclass(frozen=True)
class Request:
    """What a child is to do.

    Attributes:
        kind: DESCRIBE or TRACE of trace_worker.
        job: its arguments, values that JSON holds.
        name: of the answer, for errors.
    """

    kind: str
    job: dict[str, Any]
    name: str


class WorkerPool:
    """A server, started when it is first needed.

    Args:
        kind: of its jobs, GPU or CPU of trace_worker.
        folder: for answers and for what is printed; made.
        workers: children at a time.
        limit_seconds: that one child may take.
    """

    def __init__(self, kind: str, folder: Path, workers: int, limit_seconds: float) -> None:
        self._kind = kind
        self._folder = folder
        folder.mkdir()
        self._workers = workers
        self._limit = limit_seconds
        self._server: _Server | None = None

    @property
    def started(self) -> bool:
        """Whether the server runs."""
        return self._server is not None

    def close(self) -> None:
        """End the server and its children."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def answer(self, requests: Sequence[Request], take: Callable[[int, Path], None]) -> None:
        """Have all requests answered; after a failure no other is begun.

        Args:
            requests: to the children.
            take: told (index, file) of each answer, which the next one may replace.

        Raises:
            ValueError: one line; the user's error in the first request that failed.
            RuntimeError: one line; its child failed, or the server did. What it printed is a note.
        """
        waiting = list(enumerate(requests))
        running: set[int] = set()
        failure: Exception | None = None
        while waiting or running:
            if self._server is None:
                self._server = _Server(self._kind, self._folder / "server.log")
            while waiting and len(running) < self._workers:
                index, request = waiting.pop(0)
                self._server.send(
                    id=index, kind=request.kind, job=request.job, result=str(self._file(index)),
                    log=str(self._log(index)), seconds=self._limit,
                )  # fmt: skip
                running.add(index)
            index, status = self._received()
            running.remove(index)
            try:
                self._check(requests[index], index, status)
                take(index, self._file(index))
            except (ValueError, RuntimeError) as error:
                failure = failure or error
                waiting.clear()
        if failure is not None:
            raise failure

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.json"

    def _log(self, index: int) -> Path:
        return self._folder / f"{index}.log"

    def _received(self) -> tuple[int, int]:
        assert self._server is not None
        try:
            answer = self._server.receive()
        except RuntimeError:
            self.close()
            raise
        return answer["id"], answer["status"]

    def _check(self, request: Request, index: int, status: int) -> None:
        """Raise what a child's exit status means, unless that is success."""
        if status == 0:
            return
        if status == -signal.SIGALRM:
            raise RuntimeError(
                f"{request.name} took longer than {self._limit:g} seconds: give it more"
            )
        if status < 0:
            raise RuntimeError(
                f"{request.name} was killed by {signal.Signals(-status).name}: is there memory "
                f"for {self._workers} at a time?"
            )
        last, tail = _end_of(self._log(index))
        if status == USER_ERROR:
            raise ValueError(last)
        error = RuntimeError(f"{request.name} failed: {last}")
        error.add_note(tail)
        raise error


class _Server:
    """The process of trace_worker.py, ready for requests.

    Args:
        kind: of its jobs.
        log: file for what it prints.
    """

    def __init__(self, kind: str, log: Path) -> None:
        self._log = log
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {
            **os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "megatron_mone.planning.tracing.trace_worker"]
        with log.open("wb") as output, theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), kind], env=environment, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,  # an interrupt is for this process, which then ends it
                preexec_fn=tied(),
            )  # fmt: skip
        try:
            self.receive()  # once it is ready
        except BaseException:
            self.close()
            raise

    def send(self, **message: Any) -> None:
        """Send a request.

        Raises:
            RuntimeError: the process ended.
        """
        try:
            self._socket.send(json.dumps(message).encode())
        except ConnectionError:
            self._fail()

    def receive(self) -> dict[str, Any]:
        """The next message, when it comes.

        Raises:
            RuntimeError: the process ended.
        """
        try:
            message = self._socket.recv(LONGEST_MESSAGE)
        except ConnectionError:
            message = b""
        if not message:
            self._fail()
        return json.loads(message)

    def close(self) -> None:
        """End the process, and with it its children."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _fail(self) -> NoReturn:
        status = self._process.wait()
        last, tail = _end_of(self._log)
        error = RuntimeError(f"the tracing server ended with status {status}: {last}")
        error.add_note(tail)
        raise error


def _end_of(log: Path) -> tuple[str, str]:
    """The last line of a log, and its last few."""
    text = log.read_text(errors="replace").strip()
    return (text.splitlines()[-1] if text else "it printed nothing"), text[-_LOG_TAIL:]
