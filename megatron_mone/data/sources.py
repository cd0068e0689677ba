"""Finding inputs and cutting them into units.

A *source* is one input file; a *unit* is a byte range of it that a worker can read on its own.
Cuts fall only where a document ends, so the documents do not depend on where the cuts are.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_mone.data.errors import DataError

KINDS = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".zst")
_EXPECTED = "a .txt or .jsonl file (plain, .gz or .zst) or a directory of them"


@dataclass(frozen=True)
class Source:
    """One input file. `name` is how messages and the manifest call it."""

    path: Path
    name: str
    kind: str
    compression: str


@dataclass(frozen=True)
class Unit:
    """Bytes [start, end) of a source; `end` None is the whole (compressed) file."""

    source: Source
    start: int
    end: int | None
    first_line: int


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
    kind = next((k for k in KINDS if name.removesuffix(compression).endswith(k)), None)
    return None if kind is None else (kind, compression)


def discover(inputs: Sequence[Path], name_root: Path | None = None) -> list[Source]:
    """The sources behind files and directories, in the order given, directories sorted by path.

    Inputs are called by the path given, or relative to `name_root` if that is set. Raises
    DataError for a missing, empty, repeated or unknown input.
    """
    found: list[Source] = []
    for given in inputs:
        if given.is_dir():
            found += _discover_directory(given, name_root)
        elif not given.exists():
            raise DataError(f"--input {given}: no such file or directory; give {_EXPECTED}")
        elif (extension := split_extension(given)) is None:
            raise DataError(
                f"--input {given}: unknown extension {given.suffix!r}; give {_EXPECTED}"
            )
        elif given.stat().st_size == 0:
            raise DataError(f"--input {given}: the file is empty; give {_EXPECTED} with text in it")
        else:
            found.append(_source(given, extension, name_root))
    if not found:
        raise DataError(f"--input: nothing given; give {_EXPECTED}")
    _refuse_repeats(found)
    return found


def _discover_directory(folder: Path, name_root: Path | None) -> list[Source]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    found = [_source(p, e, name_root) for p in paths if (e := split_extension(p)) is not None]
    if not found:
        raise DataError(f"--input {folder}: holds no .txt or .jsonl file; give {_EXPECTED}")
    if all(source.path.stat().st_size == 0 for source in found):
        raise DataError(f"--input {folder}: all its {len(found)} files are empty; give {_EXPECTED}")
    return found


def _source(path: Path, extension: tuple[str, str], name_root: Path | None) -> Source:
    name = path if name_root is None else path.relative_to(name_root)
    return Source(path, name.as_posix(), *extension)


def _refuse_repeats(sources: Iterable[Source]) -> None:
    seen: set[Path] = set()
    for source in sources:
        resolved = source.path.resolve()
        if resolved in seen:
            raise DataError(f"--input {source.name}: is given twice; name each file once")
        seen.add(resolved)


def scan(source: Source, txt_documents: str, unit_bytes: int, seen: Callable[[int], None]) -> Scan:
    """Hash a source and cut it into units of about `unit_bytes` bytes, in one pass.

    Compressed files (no seeking) and .txt files that are one document are a single unit. `seen`
    is told the number of bytes of each piece read.
    """
    paragraphs = source.kind == ".txt" and txt_documents == "paragraph"
    splittable = not source.compression and (source.kind == ".jsonl" or paragraphs)
    digest, size, line = hashlib.sha256(), 0, 1
    units: list[Unit] = []
    with source.path.open("rb") as stream:
        while piece := _read_piece(stream, unit_bytes, paragraphs):
            digest.update(piece)
            if splittable:
                units.append(Unit(source, size, size + len(piece), line))
                line += piece.count(b"\n")
            size += len(piece)
            seen(len(piece))
    if not splittable:
        units = [Unit(source, 0, None if source.compression else size, 1)]
    return Scan(size, digest.hexdigest(), tuple(units))


def _read_piece(stream: BinaryIO, size: int, paragraphs: bool) -> bytes:
    """About `size` bytes, prolonged to the end of the line or of the blank line it falls in."""
    piece = stream.read(size)
    if len(piece) < size:
        return piece
    parts = [piece]
    # The rest of a half-read line says nothing on whether that line is blank, so it comes first.
    if not piece.endswith(b"\n"):
        parts.append(stream.readline())
    while paragraphs and (line := stream.readline()):
        parts.append(line)
        if not line.strip():
            break
    return b"".join(parts)
