"""Files that are whole or absent: written beside their place, forced to disk, then renamed."""

import json
import os
from pathlib import Path
from typing import Any


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk, so that a later rename never outruns them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half."""
    # The process id keeps an orphaned worker and its successor out of each other's file.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_bytes(data)
    sync_file(beside)
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`atomic_write` of indented JSON with a final newline."""
    atomic_write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_text(path: Path, flag: str) -> str:
    """The text of a file that a flag names.

    Raises:
        ValueError: it cannot be read, or is no UTF-8; one line.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{flag} {path} is not UTF-8 text") from None
