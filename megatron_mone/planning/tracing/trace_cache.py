"""A folder of traces and descriptions of jobs, so that nothing is traced twice.

A file's name is the digest of all that its content follows from: what was asked, the versions of
torch and Megatron, and the source of the rooms that take part. Files are whole or absent, so that
processes may share a folder; a damaged one counts as absent. May touch: that folder.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_mone.common.files import atomic_write
from megatron_mone.common.places import PACKAGE, user_cache

LARGEST_MIB = 1024
# Rooms that no trace enters: what they say of one may change while it stays. Of an installation's
# configs the key holds the values that were asked for.
_LEFT_OUT = (
    *("planning/cost", "planning/fitting", "reporting", "benchmarking", "demo", "commands"),
    "configs",
)


class TraceCache:
    """Files by key, the longest unused ones removed when they get too many.

    Args:
        folder: made if absent.
        largest_mib: MiB that the files may have together.

    Raises:
        ValueError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path | None = None, largest_mib: int = LARGEST_MIB) -> None:
        self.folder = user_cache("traces") if folder is None else folder
        self._largest = largest_mib << 20
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cache folder {str(self.folder)!r} cannot be made ({error.strerror}): give another"
            ) from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"cache folder {str(self.folder)!r} is not writable: give another")

    def get[Value](self, key: str, read: Callable[[Path], Value]) -> Value | None:
        """What `read` makes of the key's file; None where there is none, or it is damaged.

        Args:
            key: of `cache_key`.
            read: raises ValueError where the file is damaged.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            value = read(path)
            os.utime(path)  # used now
        except (ValueError, FileNotFoundError):  # damaged, or removed by another process
            return None
        return value

    def put(self, key: str, data: bytes) -> None:
        """Keep a file, and remove the longest unused ones beyond the limit."""
        atomic_write(self._path(key), data)
        held = []
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                status = path.stat()
                held.append((status.st_mtime_ns, status.st_size, path))
        held.sort(reverse=True)
        total = 0
        for _, size, path in held:
            total += size
            if total > self._largest:
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def cache_key(**asked: Any) -> str:
    """Digest of what is asked and of the code that answers.

    Args:
        asked: values that JSON holds.
    """
    document = {"asked": asked, "by": _answered_by()}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@functools.cache
def _answered_by() -> dict[str, str]:
    source = hashlib.sha256()
    for path in sources(PACKAGE):
        source.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    return {**versions, "source": source.hexdigest()}


def sources(root: Path) -> list[Path]:
    """Every file of the package that a trace may follow from, however deep it lies.

    Args:
        root: the package's folder.
    """
    left_out = [root / room for room in _LEFT_OUT]
    # What stands in planning itself asks for traces, and makes none.
    left_out += [path for path in (root / "planning").glob("*.py") if path.stem != "__init__"]
    files = (path for kind in ("*.py", "*.json") for path in root.rglob(kind))
    return sorted(path for path in files if not any(map(path.is_relative_to, left_out)))
