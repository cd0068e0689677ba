"""Input files, and cutting them into units.

A *source* is one input file; a *unit* is a byte range of it that a worker can read on its own.
Cuts fall only where a document ends, so the documents do not depend on where the cuts are.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_mone.data.compressed import COMPRESSIONS
from megatron_mone.data.parquet import row_groups

_KINDS = {
    ".txt": ".txt", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".jsonlines": ".jsonl",
    ".json": ".json", ".parquet": ".parquet",
}  # fmt: skip
"""How a file's name ends, and the kind that it says: one of .txt, .jsonl, .json, .parquet."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One input file. `name` is how messages and the manifest call it."""

    path: Path
    name: str
    kind: str
    compression: str


@dataclass(frozen=True)
class Unit:
    """Bytes [start, end) of a source, or row groups of a Parquet file; `end` None is all of it.

    `size` are the bytes of the file that it stands for.
    """

    source: Source
    start: int
    end: int | None
    first_line: int
    size: int


@dataclass(frozen=True)
class Scan:
    """What one pass over a source found: size in bytes, sha256 of the file, its units."""

    size: int
    sha256: str
    units: tuple[Unit, ...]


def split_extension(path: Path) -> tuple[str, str] | None:
    """(kind, compression) of a file name, or None if it is not a kind we read."""
    name = path.name.lower()
    compression = next((c for c in COMPRESSIONS if name.endswith(c)), "")
    kind = _KINDS.get(Path(name.removesuffix(compression)).suffix)
    return None if kind is None else (kind, compression)


def scan(source: Source, txt_documents: str, unit_bytes: int, seen: Callable[[int], None]) -> Scan:
    """Hash a source and cut it into units of about `unit_bytes` bytes, in one pass.

    Compressed files (no seeking), .json and .txt files that are not cut at blank lines are a single
    unit. `seen` is told the number of bytes of each piece read.
    """
    paragraphs = source.kind == ".txt" and txt_documents == "paragraph"
    splittable = not source.compression and (source.kind == ".jsonl" or paragraphs)
    digest, size, line = hashlib.sha256(), 0, 1
    units: list[Unit] = []
    with source.path.open("rb") as stream:
        while True:
            start, first_line = size, line
            for chunk in _unit_chunks(stream, unit_bytes, paragraphs):
                digest.update(chunk)
                size += len(chunk)
                line += chunk.count(b"\n")
                seen(len(chunk))
            if size == start:
                break
            units.append(Unit(source, start, size, first_line, size - start))
    if source.kind == ".parquet":
        units = _row_group_units(source, size, unit_bytes)
    elif not splittable:
        units = [Unit(source, 0, None, 1, size)]
    return Scan(size, digest.hexdigest(), tuple(units))


def _unit_chunks(stream: BinaryIO, size: int, paragraphs: bool) -> Iterator[bytes]:
    """About `size` bytes, prolonged to the end of the line or of the blank line it falls in."""
    chunk = stream.read(size)
    yield chunk
    if len(chunk) < size:
        return
    # The rest of a half-read line says nothing on whether that line is blank, so it comes first.
    while not chunk.endswith(b"\n") and (chunk := stream.readline(_CHUNK)):
        yield chunk
    blank = not paragraphs
    while not blank and (chunk := stream.readline(_CHUNK)):
        yield chunk
        blank = not chunk.strip()
        while not chunk.endswith(b"\n") and (chunk := stream.readline(_CHUNK)):
            yield chunk
            blank = blank and not chunk.strip()


def _row_group_units(source: Source, size: int, unit_bytes: int) -> list[Unit]:
    """Units of row groups; of the file's bytes each stands for its part by rows."""
    rows = row_groups(source.path, source.name)
    of_all, units = max(1, sum(rows)), []
    first = first_row = row = 0
    for index, count in enumerate(rows, 1):
        row += count
        share = size * row // of_all - size * first_row // of_all
        if share >= unit_bytes or index == len(rows):
            units.append(Unit(source, first, index, first_row + 1, share))
            first, first_row = index, row
    return units
