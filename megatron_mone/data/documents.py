"""Reading the documents of a unit, each bad one with its file:line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mone.data.compressed import decompression_errors, open_source
from megatron_mone.data.sources import Unit

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadLine:
    """A line that holds no usable document; `line` counts from 1."""

    name: str
    line: int
    reason: str

    def __str__(self) -> str:
        """`file:line: reason`, the form editors jump to."""
        return f"{self.name}:{self.line}: {self.reason}"


def read_unit(unit: Unit, json_key: str, txt_documents: str) -> Iterator[str | BadLine]:
    """The documents of a unit, in order, with a BadLine in place of each that cannot be read.

    .txt: the whole file (`txt_documents` "file", kept to the byte) or one document per block of
    lines between blank ones ("paragraph", its last line break dropped). .jsonl: the string under
    `json_key`; blank lines are skipped. A byte order mark at the head of a file is dropped.
    """
    source = unit.source
    with decompression_errors(source.name), open_source(source.path, source.compression) as stream:
        if unit.start:
            stream.seek(unit.start)
        lines = iter(stream) if unit.end is None else _lines(stream.read(unit.end - unit.start))
        if unit.start == 0:
            lines = _without_bom(lines)
        if source.kind == ".jsonl":
            yield from _json_documents(lines, source.name, unit.first_line, json_key)
        elif txt_documents == "paragraph":
            yield from _paragraphs(lines, source.name, unit.first_line)
        else:
            yield _decode(b"".join(lines), source.name, unit.first_line)


def _lines(data: bytes) -> Iterator[bytes]:
    start = 0
    while (end := data.find(b"\n", start) + 1) > 0:
        yield data[start:end]
        start = end
    if start < len(data):
        yield data[start:]


def _without_bom(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield next(lines, b"").removeprefix(_BOM)
    yield from lines


def _decode(raw: bytes, name: str, line: int) -> str | BadLine:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line + raw.count(b"\n", 0, error.start)
        return BadLine(name, bad, f"invalid UTF-8 (byte 0x{raw[error.start]:02x})")


def _paragraphs(lines: Iterator[bytes], name: str, line: int) -> Iterator[str | BadLine]:
    block: list[bytes] = []
    for number, raw in enumerate(lines, line):
        if raw.strip():
            block.append(raw)
        elif block:
            yield _decode(_drop_line_end(b"".join(block)), name, number - len(block))
            block = []
    if block:
        yield _decode(_drop_line_end(b"".join(block)), name, number + 1 - len(block))


def _drop_line_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r")


def _json_documents(
    lines: Iterator[bytes], name: str, line: int, json_key: str
) -> Iterator[str | BadLine]:
    for number, raw in enumerate(lines, line):
        if not raw.strip():
            continue
        decoded = _decode(raw, name, number)
        if isinstance(decoded, BadLine):
            yield decoded
            continue
        try:
            yield _json_text(decoded, json_key)
        except (ValueError, RecursionError) as error:
            yield BadLine(name, number, str(error))


def _json_text(line: str, json_key: str) -> str:
    """The string under `json_key` of one JSON object; ValueError says what is wrong."""
    try:
        # With its line end, an error at the end would be counted as column 1 of the next line.
        record = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    if json_key not in record:
        raise ValueError(f"key {json_key!r} is missing")
    text = record[json_key]
    if not isinstance(text, str):
        raise ValueError(f"key {json_key!r} is not a string but {type(text).__name__}")
    # JSON can spell half of a surrogate pair, which no UTF-8 text (and no tokenizer) can hold.
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"key {json_key!r} holds a lone surrogate")
    return text
