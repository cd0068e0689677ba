"""Documents in JSON: one object a line, an array of objects, or objects one after the other.

Nothing but the string under one key is used, so what Python's reader limits elsewhere in the
object (digits of a number, depth of nesting) is no reason to lose a text.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK = 1 << 20
_KEYS_SHOWN = 5
# Numbers are never used, and Python refuses to read one of more than 4,300 digits.
_DECODER = json.JSONDecoder(parse_int=lambda digits: 0)
_PAIRS = json.JSONDecoder(parse_int=lambda digits: 0, object_pairs_hook=list)
_MARKS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
"""Strings and brackets. A quotation mark alone is a string whose end is not there (yet)."""


class JsonFileError(ValueError):
    """A JSON file that cannot be read on."""


def document_text(record: str, key: str) -> str:
    """The string under `key` of one JSON object; ValueError says what is wrong with it."""
    value = _decode(record)
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {type(value).__name__}")
    if key not in value:
        raise ValueError(f"key {key!r} is missing{_other_keys(value)}")
    text = value[key]
    if not isinstance(text, str):
        raise ValueError(f"key {key!r} is not a string but {type(text).__name__}")
    quoted = json.dumps(key, ensure_ascii=False)
    if record.count(quoted) > 1 and _times_given(record, key) > 1:
        raise ValueError(f"key {key!r} is given more than once")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no UTF-8 text (and no tokenizer) can hold;
        # a reader with errors="surrogateescape" gives bytes that are no UTF-8 as such halves.
        if text[error.start] in record:
            byte = ord(text[error.start]) - 0xDC00
            raise ValueError(f"invalid UTF-8 (byte 0x{byte:02x})") from None
        raise ValueError(f"key {key!r} holds a lone surrogate") from None
    return text


def is_record(line: str) -> bool:
    """Is this line one whole JSON object, as in a .jsonl file?"""
    try:
        return isinstance(_decode(line), dict)
    except ValueError:
        return False


def _decode(record: str) -> Any:
    record = _without_mark(record)
    try:
        try:
            return _DECODER.decode(record)
        except RecursionError:
            return _DECODER.decode(_shallow(record))
    except json.JSONDecodeError as error:
        line = f" of its line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}{line}") from None


def _without_mark(record: str) -> str:
    # `cat` leaves byte order marks in the middle of a file. An error at a line's end would be
    # counted as column 1 of the next line.
    return record.removeprefix("\ufeff").rstrip("\r\n")


def _times_given(record: str, key: str) -> int:
    pairs = _PAIRS.decode(_shallow(_without_mark(record)))
    return sum(name == key for name, _ in pairs)


def _shallow(record: str) -> str:
    """`record` with every array and object inside the outermost one emptied."""
    kept, depth, begin = [], 0, 0
    for mark in _MARKS.finditer(record):
        if mark[0] in ("[", "{"):
            depth += 1
            if depth == 2:
                kept.append(record[begin : mark.end()])
        elif mark[0] in ("]", "}"):
            depth -= 1
            if depth == 1:
                begin = mark.start()
    return "".join([*kept, record[begin:] if depth < 2 else ""])


def _other_keys(value: dict[str, Any]) -> str:
    if not value:
        return ""
    names = [repr(name[:40]) for name in list(value)[:_KEYS_SHOWN]]
    return f" (there: {', '.join(names)}{', ...' if len(value) > _KEYS_SHOWN else ''})"


def split_values(stream: TextIO, longest: int) -> Iterator[tuple[int, str]]:
    """(line, text) of each element of a top-level array, or of each object that stands alone.

    Only strings, brackets and commas are looked at, so that a bad value costs no other, and no
    more of the file is held than the value being read and as much again. Raises JsonFileError
    (`LINE: reason`) where the file ends inside a value or one has more than `longest` characters.
    """
    buffer, line, counted = "", 1, 0  # `line` is that of buffer[counted]
    depth = outer = begin = scanned = 0
    ended = False
    while not ended:
        line += buffer.count("\n", counted, begin)
        buffer, scanned, begin, counted = buffer[begin:], scanned - begin, 0, 0
        if len(buffer) > longest:
            line += _lines_before_text(buffer)
            raise JsonFileError(f"{line}: a value of more than {longest:,} characters; cut it")
        chunk = stream.read(max(_CHUNK, len(buffer)))
        ended, buffer = not chunk, buffer + chunk
        values: list[tuple[int, int]] = []
        for mark in _MARKS.finditer(buffer, scanned):
            if mark[0] == '"':  # its end is in the next chunk, if anywhere
                scanned = mark.start()
                break
            scanned = mark.end()
            if mark[0] in ("[", "{"):
                if depth == 0:
                    values.append((begin, mark.start()))  # blank, or no JSON
                    outer = int(mark[0] == "[")
                    begin = mark.end() if outer else mark.start()
                depth += 1
            elif mark[0] in ("]", "}") and depth:
                depth -= 1
                if depth == 0:
                    values.append((begin, mark.start() if outer else mark.end()))
                    begin, outer = mark.end(), 0
            elif mark[0] == "," and depth == outer:
                values.append((begin, mark.start()))
                begin = mark.end()
        if ended and depth == 0:
            values.append((begin, len(buffer)))
        for first, last in values:
            if text := buffer[first:last].strip():
                start = buffer.index(text[0], first)
                line, counted = line + buffer.count("\n", counted, start), start
                yield line, text
    if depth:
        line += buffer.count("\n", counted, begin) + _lines_before_text(buffer[begin:])
        raise JsonFileError(f"{line}: the file ends inside a value that begins here; copy it again")


def _lines_before_text(value: str) -> int:
    return value.count("\n", 0, len(value) - len(value.lstrip()))
