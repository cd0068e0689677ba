"""Reading the documents of a unit, each bad one with its file:line."""

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megatron_mone.data.compressed import decompression_errors, open_source
from megatron_mone.data.errors import DataError
from megatron_mone.data.json_text import JsonFileError, document_text, split_values
from megatron_mone.data.parquet import read_column
from megatron_mone.data.sources import Unit
from megatron_mone.data.text_pieces import cut_pieces

LONGEST_DOCUMENT = 1 << 30
"""Bytes of the longest line, .txt that is one document, or JSON value: each is held whole."""
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

    .txt: the whole file (`txt_documents` "file", kept to the byte), one document per block of
    lines between blank ones ("paragraph", its last line break dropped), or pieces of so many bytes
    (a number; together the file to the byte). .jsonl: the string under `json_key` of each line;
    blank lines are skipped. .json: of each object. .parquet: of each row, which counts as a line.
    A byte order mark at the head of a file is dropped.
    """
    source = unit.source
    if source.kind == ".parquet":
        assert unit.end is not None, "row groups are counted"
        groups = range(unit.start, unit.end)
        cells = read_column(source.path, source.name, json_key, groups)
        yield from _cells(cells, source.name, unit.first_line, json_key)
        return
    with decompression_errors(source.name), open_source(source.path, source.compression) as stream:
        if source.kind == ".json":
            yield from _json_values(stream, source.name, json_key)
            return
        if unit.start:
            stream.seek(unit.start)
        if source.kind == ".txt" and txt_documents != "paragraph":
            yield from _text_documents(stream, source.name, txt_documents)
            return
        lines = _lines(stream, source.name, unit)
        if source.kind == ".jsonl":
            yield from _json_lines(lines, source.name, unit.first_line, json_key)
        else:
            yield from _paragraphs(lines, source.name, unit.first_line)


def _lines(stream: BinaryIO, name: str, unit: Unit) -> Iterator[bytes]:
    left = sys.maxsize if unit.end is None else unit.end - unit.start
    mark = _BOM if unit.start == 0 else b""
    while left and (line := stream.readline(min(left, LONGEST_DOCUMENT + 1))):
        left -= len(line)
        if len(line) > LONGEST_DOCUMENT:
            raise DataError(_too_long(name, "a line"))
        yield line.removeprefix(mark)
        mark = b""


def _too_long(name: str, what: str) -> str:
    return f"--input {name}: {what} of more than {LONGEST_DOCUMENT >> 20:,} MiB; cut it"


def _text_documents(stream: BinaryIO, name: str, txt_documents: str) -> Iterator[str | BadLine]:
    if txt_documents == "file":
        whole = stream.read(LONGEST_DOCUMENT + 1)
        if len(whole) > LONGEST_DOCUMENT:
            raise DataError(_too_long(name, "a document") + ": --txt-documents auto does")
        pieces = iter([whole])
    else:
        pieces = cut_pieces(stream, int(txt_documents))
    line, piece = 1, next(pieces, b"")  # an empty file is an empty document
    yield _decode(piece.removeprefix(_BOM), name, line)
    for following in pieces:
        line += piece.count(b"\n")
        piece = following
        yield _decode(piece, name, line)


def _decode(raw: bytes, name: str, line: int) -> str | BadLine:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line + raw.count(b"\n", 0, error.start)
        return BadLine(name, bad, f"invalid UTF-8 (byte 0x{raw[error.start]:02x})")


def _paragraphs(lines: Iterator[bytes], name: str, line: int) -> Iterator[str | BadLine]:
    block, size = [], 0
    for number, raw in enumerate(lines, line):
        if raw.strip():
            block.append(raw)
            size += len(raw)
            if size > LONGEST_DOCUMENT:
                raise DataError(_too_long(name, "a paragraph"))
        elif block:
            yield _decode(_drop_line_end(b"".join(block)), name, number - len(block))
            block, size = [], 0
    if block:
        yield _decode(_drop_line_end(b"".join(block)), name, number + 1 - len(block))


def _drop_line_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r")


def _json_lines(
    lines: Iterator[bytes], name: str, line: int, json_key: str
) -> Iterator[str | BadLine]:
    for number, raw in enumerate(lines, line):
        if not raw.strip():
            continue
        decoded = _decode(raw, name, number)
        yield decoded if isinstance(decoded, BadLine) else _text(decoded, name, number, json_key)


def _json_values(stream: BinaryIO, name: str, json_key: str) -> Iterator[str | BadLine]:
    # A byte that is no UTF-8 spoils the one document that it stands in.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        for number, value in split_values(text, LONGEST_DOCUMENT):
            yield _text(value, name, number, json_key)
    except JsonFileError as error:
        raise DataError(f"--input {name}:{error}") from None


def _text(record: str, name: str, line: int, json_key: str) -> str | BadLine:
    try:
        return document_text(record, json_key)
    except ValueError as error:
        return BadLine(name, line, str(error))


def _cells(
    cells: Iterator[bytes | None], name: str, row: int, column: str
) -> Iterator[str | BadLine]:
    for number, cell in enumerate(cells, row):
        if cell is None:
            yield BadLine(name, number, f"column {column!r} is null")
        else:
            yield _decode(cell, name, number)
