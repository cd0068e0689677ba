"""Cutting a text into pieces that are a document each: nothing is added, moved or lost."""

import re
from collections.abc import Iterator
from typing import BinaryIO

_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n")
_HANDY = 4096
_FEW, _MANY = 100, 1000
SMALLEST = 64
"""Bytes of the shortest piece."""


def is_piece(text: str) -> bool:
    """Is this the size of a piece, in decimal digits?"""
    return re.fullmatch(r"[0-9]{1,12}", text) is not None and int(text) >= SMALLEST


def piece_bytes(total: int) -> int:
    """The bytes of a piece for a text of `total` bytes.

    A thousandth of it, that every part of Megatron's own split (969,30,1) has some; of a short
    text rather a hundredth than pieces under 4 KiB, and never pieces under 64 bytes.
    """
    return max(total // _MANY, min(_HANDY, total // _FEW), SMALLEST)


def cut_pieces(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The bytes of `stream` in pieces of `size` to 2 x `size` bytes, the last one of less.

    A piece ends at the first blank line after `size` bytes; where there is none, at the first
    line end, else space, else between two characters.
    """
    pending, ended = b"", False
    while not ended:
        chunk = stream.read(max(2 * size, 1 << 20))
        ended, pending = not chunk, pending + chunk
        begin = 0
        while len(pending) - begin > 2 * size:
            end = _cut(pending, begin + size, begin + 2 * size)
            yield pending[begin:end]
            begin = end
        pending = pending[begin:]
    if pending:
        yield pending


def _cut(text: bytes, first: int, last: int) -> int:
    """The best place in (first, last] to end a piece of UTF-8; text[last] exists."""
    if blank := _BLANK_LINE.search(text, first, last):
        return blank.end()
    for separator in (b"\n", b" "):
        if (found := text.find(separator, first, last)) >= 0:
            return found + 1
    starts = (end for end in range(last, last - 4, -1) if text[end] & 0xC0 != 0x80)
    return next(starts, last)
