"""Is this file one we read? By its name, and by its first bytes."""

import stat
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mone.data import parquet
from megatron_mone.data.compressed import COMPRESSIONS, decompression_errors, open_source
from megatron_mone.data.json_text import is_record
from megatron_mone.data.sources import Source, split_extension

_HINTS = {
    "an archive of files: unpack it, and give the folder":
        (".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz", ".zip", ".7z", ".rar"),
    "a compression that is not read: decompress it": (".lz4", ".br", ".lzma", ".z", ".lzo", ".sz"),
    "a table: write it as .parquet, or as .jsonl with the text under one key":
        (".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xlsx", ".csv.gz", ".tsv.gz"),
}  # fmt: skip
_HEAD = 4096
_FIRST_LINE = 1 << 20
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16",
          b"\xfe\xff": "UTF-16"}  # fmt: skip


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not read; `wrong` if by its name it should be."""

    name: str
    reason: str
    wrong: bool = False

    def __str__(self) -> str:
        """`name: reason`."""
        return f"{self.name}: {self.reason}"


def recognise(path: Path, name_root: Path | None, json_key: str) -> Source | LeftOut:
    """The source that a file is, or why it is none."""
    name = shown_name(path, name_root)
    if not path.is_file():
        return LeftOut(name, _no_file(path))
    extension = split_extension(path)
    if extension is None:
        return LeftOut(name, _unknown(path))
    source = Source(path, name, *extension)
    if source.kind == ".parquet":
        reason = parquet.why_not_readable(path, name, json_key)
        if source.compression:
            reason = "Parquet is compressed inside: decompress it"
    else:
        reason = _wrong_bytes(source)
    if reason is not None:
        return LeftOut(name, reason, wrong=True)
    return replace(source, kind=_layout(source)) if source.kind == ".json" else source


def _no_file(path: Path) -> str:
    if not path.exists():
        return "a link to nothing"
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(path.stat().st_mode), "a device")
    return f"{kind}, and input is read more than once: write it to a file"


def _unknown(path: Path) -> str:
    name = path.name.lower()
    for hint, endings in _HINTS.items():
        if name.endswith(endings):
            return f"unknown extension {path.suffix!r}, {hint}"
    if not path.suffix:
        return "no extension: rename it if it holds text"
    return f"unknown extension {path.suffix!r}: rename it if it holds text"


def _wrong_bytes(source: Source) -> str | None:
    """Why a file is not what its name says, by its first bytes; None if it is."""
    if source.compression:
        compression = COMPRESSIONS[source.compression]
        with source.path.open("rb") as stream:
            if not stream.read(8).startswith(compression.magic):
                return f"damaged archive (it does not begin as {compression.name} does)"
    with decompression_errors(source.name), open_source(source.path, source.compression) as text:
        head = text.read(_HEAD)
    encoding = next((e for mark, e in _MARKS.items() if head.startswith(mark)), None)
    if encoding is None and len(head) >= 16 and 3 * head.count(0) > len(head):
        encoding = "UTF-16 without a byte order mark, or no text at all"
    if encoding is not None:
        return f"{encoding}, not UTF-8: convert it (iconv -f {encoding[:6]} -t UTF-8)"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if source.kind == ".json" and first and first not in b"{[":
        return f"begins with {first.decode(errors='replace')!r}, not with a JSON object or array"
    return None


def _layout(source: Source) -> str:
    """.jsonl for a .json whose first line is a whole object: then each line can be read alone."""
    with decompression_errors(source.name), open_source(source.path, source.compression) as text:
        while (line := text.readline(_FIRST_LINE)) and not line.strip():
            pass
    decoded = line.decode("utf-8-sig", errors="replace")
    return ".jsonl" if line.endswith(b"\n") and is_record(decoded) else ".json"


def shown_name(path: Path, name_root: Path | None) -> str:
    """The name of a file for messages and the manifest: printable, on one line."""
    name = (path if name_root is None else path.relative_to(name_root)).as_posix()
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in name
    )
