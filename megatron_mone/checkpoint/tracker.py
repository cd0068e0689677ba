"""The tracker file: the iteration that a resumed run loads, moved in one step or not at all.

Megatron opens `latest_checkpointed_iteration.txt` for writing and then writes it
(megatron/training/checkpointing.py: iter_finalize_fn). A rank killed between the two leaves an
empty file, and `read_metadata` then ends the next run with status 0 and nothing trained. May
touch: the checkpoint folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mone.common.files import sync_file

TRACKER_NAME = "latest_checkpointed_iteration.txt"
ITERATION_FORMAT = "iter_{:07d}"


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk; a rename is durable only after this."""
    sync_file(folder)


def read_tracker(folder: Path) -> str | None:
    """The text of the tracker file in `folder` ("8" or "release"), None when there is no file."""
    path = folder / TRACKER_NAME
    if not path.is_file():
        return None
    return path.read_text(encoding="utf-8", errors="replace").strip()


def iteration_of(folder: Path) -> int | None:
    """8 for a folder named iter_0000008, None for any other name."""
    number = folder.name.removeprefix("iter_")
    return int(number) if folder.name != number and number.isdigit() else None


def iterations(folder: Path) -> list[int]:
    """The iterations that have a folder in `folder`, newest first; a save under way is none."""
    found = (iteration_of(path) for path in folder.glob("iter_*") if path.is_dir())
    return sorted((number for number in found if number is not None), reverse=True)


def stage(path: Path, text: str) -> None:
    """Write the tracker's next text beside it, on disk: the later `commit` needs no new space."""
    beside = _staged(path)
    beside.write_text(text, encoding="utf-8")
    sync_file(beside)


def commit(path: Path, text: str, last_look: Callable[[], None] = lambda: None) -> None:
    """Let the tracker say `text`: a reader, or the next run, sees the old text or the new one.

    Args:
        path: of the tracker.
        text: it is staged first, where it is not yet.
        last_look: called when only the rename is left; it may raise. The rename fails where another
            process has committed since, for that took the staged file, whose name is fixed.

    Raises OSError.
    """
    beside = _staged(path)
    if not beside.is_file() or beside.read_text(encoding="utf-8", errors="replace") != text:
        stage(path, text)
    last_look()
    beside.replace(path)
    sync_folder(path.parent)


def _staged(path: Path) -> Path:
    # One fixed name: what a killed run leaves is overwritten by the next save.
    return path.with_name(f".{path.name}.next")


class TrackerFile:
    """What Megatron gets instead of `open(tracker, "w")`; leaving the `with` block commits."""

    last_look: Callable[[], None] = staticmethod(lambda: None)
    """Of `commit`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        self._text = ""

    def write(self, text: str) -> None:
        """Keep the text until the end of the block."""
        self._text += text

    def __enter__(self) -> TrackerFile:
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is None:
            commit(self._path, self._text, self.last_look)


class TrackerStorage:
    """Megatron's `maybe_msc` with one change: a local tracker file is written by `TrackerFile`."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """As `maybe_msc.open`; remote (msc://) paths are the remote storage's to write."""
        local = not str(path).startswith("msc://")
        if local and "w" in mode and Path(path).name == TRACKER_NAME:
            return TrackerFile(path)
        return self._storage.open(path, mode, *args, **kwargs)
