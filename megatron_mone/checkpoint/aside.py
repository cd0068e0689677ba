"""A save is written into a folder of its own, and becomes a checkpoint in one rename when whole.

    .saving-1f3a9c2e-iter_0000008    renamed to iter_0000008 by `publish`

The name is new in each save and nothing that lists iter_* sees it, so what a process writes there
that has lost the checkpoint folder, frozen in a write or on a node given up, harms nobody. The
rename fails where a newer attempt has saved the same iteration. What is in the way of a save is
renamed likewise before it is removed, and is back if the lease turns out to be lost: a look that
follows the rename tells that no newer attempt had made it. May touch: the checkpoint folder.
"""

import secrets
import shutil
import warnings
from pathlib import Path

from megatron_mone.checkpoint import ownership
from megatron_mone.checkpoint.tracker import sync_folder

_PREFIX = ".saving-"


def beside(path: Path) -> Path:
    """A name beside `path`, of a folder or a file, that no process knows."""
    name = path.name.rpartition("-")[2]  # of one that has such a name already: its first
    return path.with_name(f"{_PREFIX}{secrets.token_hex(4)}-{name}")


def left_in(folder: Path) -> list[Path]:
    """All that has such a name in a checkpoint folder, none of it a newer attempt's.

    Raises:
        LeaseLostError: this rank holds the folder no more.
        OSError: it cannot be read.
    """
    found = sorted(folder.glob(f"{_PREFIX}*"))
    ownership.check()  # what was there when no newer attempt was
    return found


def publish(aside: Path, folder: Path) -> None:
    """Let a whole checkpoint have its place.

    Raises:
        LeaseLostError: this rank holds the checkpoint folder no more.
        OSError: there is one already.
    """
    ownership.check()
    aside.rename(folder)
    sync_folder(folder.parent)


def take_away(path: Path) -> Path | None:
    """Move what is at `path` out of everybody's sight.

    Returns:
        Where it is now, this process's own; None if there was nothing.

    Raises:
        LeaseLostError: this rank holds the checkpoint folder no more; all is as it was.
        OSError: it cannot be moved, or it cannot be known.
    """
    away = beside(path)
    try:
        path.rename(away)
    except FileNotFoundError:
        return None
    try:
        ownership.check()
    except Exception:
        away.rename(path)
        raise
    return away


def remove(path: Path) -> None:
    """Take a file or folder away and free its space. Raises as `take_away`."""
    away = take_away(path)
    if away is None:
        return
    if away.is_dir() and not away.is_symlink():
        shutil.rmtree(away, ignore_errors=True)
    else:
        away.unlink(missing_ok=True)
    if away.exists():  # a file in it is open on this NFS client, or another user's
        warnings.warn(f"{away} could not be removed: the next save tries again", stacklevel=2)
