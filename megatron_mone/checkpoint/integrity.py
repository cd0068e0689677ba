"""Sizes and SHA-256 sums of a checkpoint's files, in the folder they describe.

The file is Megatron's own `integrity.json` (core/dist_checkpointing/validation.py, written there
with --verify-integrity) with two more keys, so either program checks the other's checkpoints:

    {"algorithm": "sha256", "files": {name: hex}, "sizes": {name: bytes}, "digest": hex}

`digest` covers the rest, so that damage to this file is not blamed on another. The sums find
accidents, not attackers: who can write the files can write the sums. Reading a file once for its
sum costs one SHA-256 pass over the checkpoint, shared by the ranks; THREADS files at a time. No
torch.distributed here: who hashes what is the caller's choice. May touch: a checkpoint folder.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_mone.checkpoint.tracker import sync_folder
from megatron_mone.common.files import sync_file, write_json

SUMS_NAME = "integrity.json"
ALGORITHM = "sha256"
THREADS = 4
SHARD_NAME = re.compile(r"__(\d+)_\d+\.distcp")
"""torch_dist names a shard after the rank that wrote it: `__{rank}_{i}.distcp`."""


@dataclass(frozen=True)
class Entry:
    """One file as it was saved."""

    sha256: str
    size: int | None
    """Bytes; None in a file that Megatron wrote."""


def own_files(folder: Path, rank: int) -> list[str]:
    """The files that `rank` sums: the shards it wrote; rank 0 also those that no rank is named in.

    A rank's own shards are in its node's page cache, and the work grows no faster than the save.
    """
    names = []
    for path in folder.iterdir():
        match = SHARD_NAME.fullmatch(path.name)
        writer = int(match[1]) if match else 0
        if path.is_file() and writer == rank and path.name != SUMS_NAME:
            names.append(path.name)
    return sorted(names)


def sum_files(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Read every named file once. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _sum_file(folder / name), names), strict=True))


def _sum_file(path: Path) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, ALGORITHM)
        return Entry(digest.hexdigest(), file.tell())


def write_sums(folder: Path, entries: dict[str, Entry]) -> None:
    """Write the sums of a complete checkpoint atomically, after its small files are on disk.

    Megatron forces the shards to disk but not metadata.json. Raises OSError.
    """
    for name in entries:
        if not SHARD_NAME.fullmatch(name):
            sync_file(folder / name)
    value = {
        "algorithm": ALGORITHM,
        "files": {name: entries[name].sha256 for name in sorted(entries)},
        "sizes": {name: entries[name].size for name in sorted(entries)},
    }
    write_json(folder / SUMS_NAME, {**value, "digest": _digest(value)})
    sync_folder(folder)


def read_sums(folder: Path) -> dict[str, Entry] | None:
    """{file name: Entry} of a checkpoint folder, None when it has no sums.

    Raises:
        ValueError: the file is damaged, or of a kind that is not known here.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        digest = value.pop("digest", None)
        files, sizes = dict(value["files"]), dict(value.get("sizes", {}))
        if digest is not None and digest != _digest(value):
            raise ValueError("its own digest does not match")
        if value["algorithm"] != ALGORITHM:
            raise ValueError(f"algorithm {value['algorithm']!r} is not {ALGORITHM!r}")
        if any(Path(name).name != name for name in files):
            raise ValueError("a name in it points out of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint file {path} is corrupted ({error})") from error
    return {name: Entry(total, sizes.get(name)) for name, total in files.items()}


def find_damage(folder: Path, entries: dict[str, Entry], sums: bool = True) -> str | None:
    """What is wrong with the named files, None when nothing is.

    Args:
        folder: of the checkpoint.
        entries: the files to look at.
        sums: compare checksums too, which reads the files; otherwise sizes alone.

    Returns:
        A clause that names the first damaged file by its whole path.
    """
    for name, entry in entries.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"checkpoint file {path} is missing or unreadable ({error.strerror})"
        if entry.size is not None and size != entry.size:
            kind = "truncated" if size < entry.size else "too long"
            return f"checkpoint file {path} is {kind}: {size} bytes, saved with {entry.size}"
    if not sums:
        return None
    try:
        now = sum_files(folder, entries)
    except OSError as error:
        return f"checkpoint file {error.filename or folder} is unreadable ({error.strerror})"
    for name, entry in entries.items():
        if now[name].sha256 != entry.sha256:
            return (
                f"checkpoint file {folder / name} is corrupted: its SHA-256 is not the one "
                "recorded when it was saved"
            )
    return None


def _digest(value: dict) -> str:
    return hashlib.new(ALGORITHM, json.dumps(value, sort_keys=True).encode()).hexdigest()
