"""What a rank says when it fails before its first step has ended: one line, and a log.

What checks of ours (checks/) do not foresee ends here: the error's class, Megatron's words and the
flags most likely meant. The traceback is in a file that the line names; whichever rank makes that
file says the line, so that ranks which fail alike, or because that one did, are silent. After the
first step an error is a bug, and Python's traceback stays. May touch: that file, Megatron's
fault-tolerance hooks.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

from megatron_mone.command_line import ERROR
from megatron_mone.exit_status import USER_ERROR
from megatron_mone.likely_flags import likely_flags
from megatron_mone.liveness import PROGRESS_VARIABLE

UNEXPECTED = 1
"""Not the user's: a peer, a disk or a network failed, and another start may go well."""
PATIENCE_SECONDS = 1.0
"""That other ranks leave to rank 0 to say what they all would."""
LONGEST_WORDS = 400
_ENDED = ("on_training_step_end", "on_eval_step_end")
_NOT_THE_USERS = re.compile(
    r"gloo|nccl|connection|timed? ?out|socket|CUDA error|out of memory|broken pipe", re.IGNORECASE
)
_IN_US = f"{os.sep}megatron_mone{os.sep}"


def watch_first_step() -> tuple[Callable[[], bool], Callable[[], None]]:
    """(whether a step of training or evaluation has ended since, what ends the watching)."""
    from megatron.training import ft_integration

    done: list[bool] = []
    originals = {name: getattr(ft_integration, name) for name in _ENDED}

    def noting(original: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(original)
        def ended() -> None:
            done.append(True)
            for name, before in originals.items():
                setattr(ft_integration, name, before)
            original()

        return ended

    for name, original in originals.items():
        setattr(ft_integration, name, noting(original))

    def end() -> None:
        if not done:
            for name, before in originals.items():
                setattr(ft_integration, name, before)

    return lambda: bool(done), end


def end_with_line(error: BaseException, args: Namespace | None) -> NoReturn:
    """Say the error in one line, write its traceback to a file, and leave.

    Args:
        error: that ends this rank.
        args: Megatron's, where they were read.

    Raises:
        SystemExit: USER_ERROR where another start would end the same way, else UNEXPECTED; where
            another rank failed before, its status.
    """
    status = USER_ERROR if _is_the_users(error) else UNEXPECTED
    log, rank = _log_file(args), os.environ.get("RANK", "0")
    said = f"{_line(error, args)}; the traceback is in {log}"
    if rank != "0":
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and not log.exists():
            time.sleep(PATIENCE_SECONDS / 20)
    text = "".join(traceback.format_exception(error))
    try:
        with log.open("x") as stream:
            stream.write(f"{status} (rank {rank})\n{said}\n\n{text}")
    except FileExistsError:
        raise SystemExit(_status_in(log, status)) from error
    except OSError as full:
        said += f", which could not be written ({full.strerror})"
    print(f"{ERROR} {said}", file=sys.stderr, flush=True)
    raise SystemExit(status) from error


def words(error: BaseException) -> str:
    """The error's class and words; the statement that raised it where it has none.

    Of errors raised from one another the first, which knows what was wrong.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split())
    if _is_ours(error) and isinstance(error, ValueError):
        return said
    if isinstance(error, KeyError):
        said = f"no {said}"
    if not said:
        said = _statement(error)
    if len(said) > LONGEST_WORDS:
        said = f"{said[:LONGEST_WORDS]} ..."
    return f"{type(error).__name__}: {said}"


def _line(error: BaseException, args: Namespace | None) -> str:
    said = words(error)
    flags = () if _is_ours(error) else likely_flags(error, said, args)
    return f"{said}: most likely of {', '.join(flags)}" if flags else said


def _statement(error: BaseException) -> str:
    """The source of the statement that raised an error."""
    import linecache

    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no words"
    last = frames[-1]
    lines = range(last.lineno or 0, (last.end_lineno or last.lineno or 0) + 1)
    return " ".join(" ".join(linecache.getline(last.filename, n) for n in lines).split())


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


def _log_file(args: Namespace | None) -> Path:
    """The same for all ranks of an attempt, new for each."""
    progress = os.environ.get(PROGRESS_VARIABLE)
    if progress:  # runs/NAME/attempts/ATTEMPT.progress, beside runs/NAME/logs/ATTEMPT
        attempt = Path(progress)
        folders = [attempt.parent.parent / "logs" / attempt.stem]
    else:
        given = (getattr(args, name, None) for name in ("tensorboard_dir", "save"))
        folders = [Path(folder) for folder in given if folder]
    name = f"failure-{_attempt()}.log"
    for folder in folders:
        if folder.is_dir() and os.access(folder, os.W_OK):
            return folder / name
    return Path(tempfile.gettempdir()) / f"megatron-mone-{os.getuid()}-{name}"


def _attempt() -> str:
    """A name that the ranks of one start have in common, those of one node at least."""
    job, count = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job and "SLURM_STEP_ID" in os.environ:
        return f"{job}-{count}-{os.environ['SLURM_STEP_ID']}"
    own = psutil.Process()
    start = own if "RANK" not in os.environ else own.parent() or own
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"{start.pid}-{int(start.create_time())}-{count}"


def _status_in(log: Path, otherwise: int) -> int:
    """The status that the rank which failed before ended with."""
    try:
        return int(log.read_text(errors="replace").split(maxsplit=1)[0])
    except (OSError, ValueError, IndexError):
        return otherwise
