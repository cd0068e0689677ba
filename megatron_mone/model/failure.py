"""What a rank says when it fails before its first step has ended: one line, and a log.

What checks of ours (checks/) do not foresee ends here: the error's class, Megatron's words and the
flags most likely meant. The traceback is in a file that the line names; whichever rank makes that
file says the line, so that ranks which fail alike, or because that one did, are silent. After the
first step an error is a bug, and Python's traceback stays. May touch: that file.
"""

import linecache
import logging
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from megatron_mone.common.command_line import ERROR
from megatron_mone.common.exit_status import USER_ERROR
from megatron_mone.model.likely_flags import likely_flags
from megatron_mone.model.liveness import PROGRESS_VARIABLE, on_step_end

UNEXPECTED = 1
"""Not the user's: a peer, a disk or a network failed, and another start may go well."""
_CLOCK_TICK = 0.01
"""A file's time is that of the kernel's last tick."""
PATIENCE_SECONDS = 1.0
"""That other ranks leave to rank 0 to say what they all would."""
LONGEST_WORDS = 400
_NOT_THE_USERS = re.compile(
    r"gloo|nccl|connection|timed? ?out|socket|CUDA error|out of memory|broken pipe", re.IGNORECASE
)
_IN_US = f"{os.sep}megatron_mone{os.sep}"
_begun = [time.time()]


def begin() -> float:
    """Call it where a run begins in this process, before anything of it can fail; the time now.

    A shell or a test may start run after run: a failure's log that is older is of another.
    """
    _begun[0] = time.time()
    return _begun[0]


def watch_first_step() -> tuple[Callable[[], bool], Callable[[], None]]:
    """(whether a step of training or evaluation has ended since, what ends the watching)."""
    done = threading.Event()
    # StragglerDetector.__exit__ logs the traceback of what goes through it.
    logging.getLogger("megatron.core.utils").addFilter(_has_no_traceback)
    return done.is_set, on_step_end(done.set)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return "Traceback (most recent call last)" not in record.getMessage()


def end_with_line(error: BaseException, args: Namespace | None, command: Sequence[str]) -> NoReturn:
    """Say the error in one line, write its traceback to a file, and leave.

    Args:
        error: that ends this rank.
        args: Megatron's, where they were read.
        command: its words.

    Raises:
        SystemExit: USER_ERROR where another start would end the same way, else UNEXPECTED; where
            another rank failed before, its status.
    """
    log = log_file(args)
    said = _line(error, args, command)
    if not (_is_ours(error) and isinstance(error, ValueError)):
        said += f"; the traceback is in {log}"
    text = "".join(traceback.format_exception(error))
    raise SystemExit(say_once(said, USER_ERROR if _is_the_users(error) else UNEXPECTED, log, text))


def say_once(said: str, status: int, log: Path, text: str = "") -> int:
    """Say a line, unless another rank has; rank 0 goes first, and may be late, or well.

    Args:
        said: the line, without its head.
        status: to end with.
        log: of `log_file`; whichever rank makes it says the line.
        text: that goes into the file, after the line.

    Returns:
        The status to end with: that of the rank which said the line, for whoever started the ranks
        may see any of them end first.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and not _is_of_this_run(log):
            time.sleep(PATIENCE_SECONDS / 20)
    try:
        if not _is_of_this_run(log):
            log.unlink(missing_ok=True)
        with log.open("x") as stream:
            stream.write(f"{status} (rank {rank})\n{said}\n\n{text}")
    except FileExistsError:
        return _status_in(log, status)
    except OSError as full:
        said += f" ({log} could not be written: {full.strerror})"
    print(f"{ERROR} {said}", file=sys.stderr, flush=True)
    return status


def _is_of_this_run(log: Path) -> bool:
    try:
        return log.stat().st_mtime >= _begun[0] - _CLOCK_TICK
    except OSError:
        return False


def words(error: BaseException) -> str:
    """The error's class and words; the statement that raised it where it has none.

    Of errors raised from one another the first, which knows what was wrong. Assertions and wrong
    values that have words speak for themselves.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split())
    if said and (_is_ours(error) or isinstance(error, AssertionError)):
        return _shortened(said)
    if isinstance(error, KeyError):
        said = f"no {said}"
    return f"{type(error).__name__}: {_shortened(said or _statement(error))}"


def _shortened(said: str) -> str:
    return said if len(said) <= LONGEST_WORDS else f"{said[:LONGEST_WORDS]} ..."


def _line(error: BaseException, args: Namespace | None, command: Sequence[str]) -> str:
    said = words(error)
    flags = () if _is_ours(error) else likely_flags(error, said, args, command)
    return f"{said}: most likely of {', '.join(flags)}" if flags else said


def _statement(error: BaseException) -> str:
    """The source of the statement that raised an error, and the values of what it names."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no words"
    last = frames[-1]
    lines = range(last.lineno or 0, (last.end_lineno or last.lineno or 0) + 1)
    source = " ".join(" ".join(linecache.getline(last.filename, n) for n in lines).split())
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    values = [] if place is None else _values(source, place.tb_frame.f_locals)
    return f"{source}, where {', '.join(values)}" if values else source


def _values(source: str, names: dict[str, Any]) -> list[str]:
    """`NAME = VALUE` of each plain value that a statement names, by itself or as args.NAME."""
    found = {}
    for owner, name in re.findall(r"\b(?:(args|self|config)\.)?([a-z]\w*)\b", source):
        value = getattr(names.get(owner), name, ...) if owner else names.get(name, ...)
        if value is None or isinstance(value, int | float | str):
            found[name] = f"{name} = {value!r}"
    return list(found.values())


def _is_ours(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _IN_US in frames[-1].filename


def _is_the_users(error: BaseException) -> bool:
    """Whether another start would end the same way."""
    if isinstance(error, (MemoryError, EOFError)):
        return False
    if isinstance(error, OSError):
        return isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError))
    if type(error).__module__.startswith("torch.distributed"):
        return False
    return not (isinstance(error, RuntimeError) and _NOT_THE_USERS.search(str(error)))


def log_file(args: Namespace | None) -> Path:
    """The same for all ranks of an attempt, or for those on a node."""
    progress = os.environ.get(PROGRESS_VARIABLE)
    if progress:  # runs/NAME/attempts/ATTEMPT.progress, beside runs/NAME/logs/ATTEMPT
        logs = Path(progress).parent.parent / "logs" / Path(progress).stem
        if _is_writable(logs):
            return logs / "failure.log"
    name = f"failure-{_start()}.log"
    for folder in (getattr(args, name, None) for name in ("tensorboard_dir", "save")):
        if folder and _is_writable(Path(folder)):
            return Path(folder) / name
    return Path(tempfile.gettempdir()) / f"megatron-mone-{os.getuid()}-{name}"


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)


def _start() -> str:
    """A name that this node's ranks of one start have in common: of the process that started
    them."""
    own = psutil.Process()
    starter = own if "RANK" not in os.environ else own.parent() or own
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"{starter.pid}-{int(starter.create_time())}-{count}"


def _status_in(log: Path, otherwise: int) -> int:
    """The status that the rank which failed before ended with."""
    try:
        return int(log.read_text(errors="replace").split(maxsplit=1)[0])
    except (OSError, ValueError, IndexError):
        return otherwise


def fail(message: str, status: int = USER_ERROR) -> NoReturn:
    """Print one line, on one rank only, and exit."""
    said = " ".join(message.split())
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise SystemExit(say_once(said, status, log_file(None)))
    print(f"{ERROR} {said}", file=sys.stderr, flush=True)
    raise SystemExit(status)
