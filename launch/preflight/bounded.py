"""A call that ends in time whatever it does: it runs in a forked child, which is killed if not.

A hung file system, driver or collective stops the child only. May touch: one child process a call.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_mone.common.child_processes import end_with

_LONGEST_ERROR = 300


class CallFailed(Exception):
    """The call raised, died or took too long; the text says which, in one line."""


def bounded(call: Callable[[], Any], seconds: float) -> Any:
    """What `call()` returns, from a child process.

    What it prints on stdout goes to stderr: stdout belongs to the one line of a check.

    Args:
        call: returns a JSON value.
        seconds: the child's time.

    Raises:
        CallFailed: it raised, its process died, or its time was over.
    """
    if seconds <= 0:
        raise CallFailed("no time was left")
    deadline = time.monotonic() + seconds
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _answer(call, writing, seconds, parent)
    os.close(writing)
    try:
        text = _first_line(reading, deadline)
    finally:
        os.close(reading)
        status = _end(child)
    if text is None:
        raise CallFailed(f"no answer in {seconds:.3g} s")
    if not text.endswith(b"\n"):
        raise CallFailed(f"its process ended with status {os.waitstatus_to_exitcode(status)}")
    answer = json.loads(text)
    if "error" in answer:
        raise CallFailed(answer["error"])
    return answer["value"]


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks and not too long; our own say it in words."""
    lines = str(error).splitlines() or [""]
    kind = "" if type(error).__module__.startswith("launch.") else f"{type(error).__name__}: "
    return f"{kind}{' '.join(lines[0].split())}"[:_LONGEST_ERROR]


def _answer(call: Callable[[], Any], writing: int, seconds: float, parent: int) -> NoReturn:
    """The child: never returns, also when the parent was killed."""
    try:
        end_with(parent)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        os.dup2(2, 1)
        try:
            text = json.dumps({"value": call()})
        except BaseException as error:
            text = json.dumps({"error": one_line(error)})
        with os.fdopen(writing, "w") as pipe:
            pipe.write(text + "\n")
    finally:
        # Whatever happens: a child that went on would be a second parent. Without the
        # interpreter's end, which waits for threads of NCCL.
        os._exit(0)


def _first_line(reading: int, deadline: float) -> bytes | None:
    """Up to the line feed; less when the child died; None at the deadline.

    The end of the pipe is not waited for: a child's own children hold it too.
    """
    text = b""
    while not text.endswith(b"\n"):
        left = max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            return None
        part = os.read(reading, 65536)
        if not part:
            break
        text += part
    return text


def _end(child: int) -> int:
    """Kill a child and return its status; 0 for one that the kernel cannot end now."""
    for attempt in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        # A child that has answered or closed its pipe ends by itself within moments.
        if attempt == 10:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return 0
